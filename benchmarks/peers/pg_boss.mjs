/** pg-boss: jobs in Postgres for Node. One queue for each work, since a handler belongs to a queue. */

import { databaseUrl, inSlices, load, main, range, Steps, wordOf } from "./contract.mjs";

const WORKS = ["job", "mark", "linger"];
const BATCH_JOBS = 1_000;
const WORKERS_PER_QUEUE = 2;
const HEARTBEAT_SECONDS = 30;
const BULK_JOBS = 10_000;

const names = WORKS.map((work) => `'${work}'`).join(", ");

const description = {
  name: "pg-boss",
  version: "12.38.0",
  language: "node",
  requires: ["pg-boss@12.38.0"],
  durable: false,
  sleeps: false,
  works: WORKS,
  left: `select count(*) from pgboss.job where state in ('created', 'retry', 'active') and name in (${names})`,
  done: `select count(*) from pgboss.job where state = 'completed' and name in (${names})`,
  settings: [
    `batchSize ${BATCH_JOBS}: one fetch and one completion for so many jobs, which its author advises for speed`,
    "burstWhenBatchFull: fetches again at once while batches come back full, instead of waiting for the next poll",
    `localConcurrency ${WORKERS_PER_QUEUE}: one batch runs while the next is fetched`,
    "useListenNotify, and notify on each queue: «cutting dispatch latency to milliseconds»",
    `heartbeatSeconds ${HEARTBEAT_SECONDS}: of its table of recommended values for quick tasks, so that a dead worker ` +
      "is found within one to two minutes instead of fifteen",
    `bulk by insert() with slices of ${BULK_JOBS} jobs`,
  ],
  remark:
    "a batch is completed or failed as a whole; keeps finished jobs for seven days; asks for Node 22.12 and works on " +
    "Node 20",
};

async function start(options) {
  const { PgBoss } = await load("pg-boss");
  const boss = new PgBoss({ connectionString: databaseUrl(), ...options });
  boss.on("error", (error) => console.error(error));
  await boss.start();
  return boss;
}

async function install() {
  const boss = await start({ supervise: false, schedule: false });
  for (const work of WORKS) await boss.createQueue(work, { notify: true, heartbeatSeconds: HEARTBEAT_SECONDS });
  await boss.stop();
}

const data = (number, word) => ({ number, word });

async function producer() {
  const boss = await start({ supervise: false, schedule: false });
  return {
    bulk: (work, count) =>
      inSlices(count, BULK_JOBS, (start, end) =>
        boss.insert(
          work,
          range(start, end).map((number) => ({ data: data(number, wordOf(number)) })),
        ),
      ),
    single: (work, number, word) => boss.send(work, data(number, word)),
    close: () => boss.stop(),
  };
}

async function worker() {
  const steps = new Steps();
  const handlers = {
    job: () => steps.effect(),
    mark: ({ word }) => steps.marked(word),
    linger: () => steps.linger(),
  };
  const boss = await start({ useListenNotify: true });
  const options = { batchSize: BATCH_JOBS, burstWhenBatchFull: true, localConcurrency: WORKERS_PER_QUEUE };
  for (const work of WORKS)
    await boss.work(work, options, (jobs) => Promise.all(jobs.map((job) => handlers[work](job.data))).then(() => {}));
  return { stop: () => boss.stop() };
}

await main({ description, install, producer, worker });
