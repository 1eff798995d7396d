/** graphile-worker: jobs in Postgres for Node. The settings are those that its documentation gives its own benchmark. */

import { EventEmitter, once } from "node:events";

import { databaseUrl, inSlices, load, main, range, Steps, wordOf } from "./contract.mjs";

const CONCURRENT_JOBS = 24;
const BULK_JOBS = 10_000;

const WORKER = {
  concurrentJobs: CONCURRENT_JOBS,
  maxPoolSize: CONCURRENT_JOBS + 1,
  localQueue: { size: 500 },
  completeJobBatchDelay: 0,
  failJobBatchDelay: 0,
};

const description = {
  name: "graphile-worker",
  version: "0.18.0",
  language: "node",
  requires: ["graphile-worker@0.18.0"],
  durable: false,
  sleeps: false,
  works: ["job", "mark", "linger"],
  left: "select count(*) from graphile_worker._private_jobs where locked_at is not null or attempts < max_attempts",
  done: null,
  settings: [
    "concurrentJobs 24 and maxPoolSize 25: what its page on performance reaches its own figures with",
    "localQueue of 500 jobs, of the same page: one fetch feeds all concurrent jobs, which increases throughput " +
      "«sometimes by an order of magnitude»",
    "completeJobBatchDelay 0 and failJobBatchDelay 0, of the same page: jobs that end together are released in one " +
      "statement, without waiting for more",
    `bulk by its SQL function add_jobs with one JSON document of up to ${BULK_JOBS} jobs, as its performance test ` +
      "enqueues: unlike addJobs() it returns no rows",
    "no log line per job: its performance test turns it off too",
  ],
  remark:
    "deletes finished jobs; the jobs of a killed worker stay locked for four hours, unless an operator or its " +
    "commercial plugin releases them; asks for Node 22.18 and works on Node 20",
};

async function connectionOptions() {
  const { Logger } = await load("graphile-worker");
  const logger = new Logger(() => (level, message) => {
    if (level === "error" || level === "warning") console.error(message);
  });
  return { connectionString: databaseUrl(), logger };
}

async function install() {
  const { runMigrations } = await load("graphile-worker");
  await runMigrations(await connectionOptions());
}

const payload = (number, word) => ({ number, word });

async function producer() {
  const { makeWorkerUtils } = await load("graphile-worker");
  const utils = await makeWorkerUtils(await connectionOptions());
  const addJobs = (jobs) =>
    utils.withPgClient((client) =>
      client.query(
        "select 1 from graphile_worker.add_jobs(array(" +
          "select json_populate_recordset(null::graphile_worker.job_spec, $1::json)))",
        [JSON.stringify(jobs)],
      ),
    );
  return {
    bulk: (work, count) =>
      inSlices(count, BULK_JOBS, (start, end) =>
        addJobs(range(start, end).map((number) => ({ identifier: work, payload: payload(number, wordOf(number)) }))),
      ),
    single: (work, number, word) => utils.addJob(work, payload(number, word)),
    close: () => utils.release(),
  };
}

async function worker() {
  process.env.NO_LOG_SUCCESS = "1";
  const { run } = await load("graphile-worker");
  const steps = new Steps();
  const events = new EventEmitter();
  const listening = once(events, "pool:listen:success");
  const runner = await run({
    ...(await connectionOptions()),
    preset: { worker: WORKER },
    events,
    noHandleSignals: true,
    taskList: {
      job: () => steps.effect(),
      mark: ({ word }) => steps.marked(word),
      linger: () => steps.linger(),
    },
  });
  await listening;
  return { stop: () => runner.stop() };
}

await main({ description, install, producer, worker });
