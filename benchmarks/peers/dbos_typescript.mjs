/** DBOS for TypeScript: durable workflows in Postgres, enqueued on a database-backed queue. */

import { databaseUrl, inSlices, load, main, range, Steps, wordOf } from "./contract.mjs";

const APPLICATION = "bench";
const VERSION = "1";
const QUEUE = "bench";
const WAITING_QUEUE = "waiting";
const WORKER_CONCURRENCY = 100;
const POLLING_MILLISECONDS = 100;
const POOL_CONNECTIONS = 20;
const BULK_RUNS = 1_000;
const DAY_MILLISECONDS = 24 * 60 * 60 * 1000;

const description = {
  name: "DBOS TypeScript",
  version: "5.3.0",
  language: "node",
  requires: ["@dbos-inc/dbos-sdk@5.3.0", "pg@8.23.1"],
  durable: true,
  sleeps: true,
  works: ["job", "one", "two", "ten", "mark", "linger", "sleep"],
  left: "select count(*) from dbos.workflow_status where status in ('ENQUEUED', 'PENDING', 'DELAYED')",
  done: "select count(*) from dbos.workflow_status where status = 'SUCCESS'",
  settings: [
    `workerConcurrency ${WORKER_CONCURRENCY}: «worker concurrency limits are recommended for most use cases»; without ` +
      "one the first worker to poll takes the whole backlog",
    `minPollingIntervalMs ${POLLING_MILLISECONDS} instead of 1000: a queue is polled and has no notification, so that ` +
      "the interval is its latency, and with the limit above also bounds its runs per second",
    `systemDatabasePoolSize ${POOL_CONNECTIONS} instead of 10: each running workflow writes on its own, and commits of ` +
      "several connections share a flush",
    "executorID of its own for each process: «it must be set to a unique value for each process» without Conductor",
    `bulk by enqueueInTransaction(), ${BULK_RUNS} workflows in each transaction: it has no call for many workflows`,
    "sleep on a second queue without limit: a sleeping workflow stays in its process and counts as running",
  ],
  remark:
    "keeps finished workflows and their steps; a workflow of a killed process is recovered by its commercial Conductor, " +
    "or when a process with the same executorID starts",
};

const queueOf = (work) => (work === "sleep" ? WAITING_QUEUE : QUEUE);

/** Tells troubles in one short line each: at its end a worker names all the workflows that still run. */
const shortly = (message) => console.error(String(message).slice(0, 200));
const logger = { debug() {}, info() {}, warn: shortly, error: shortly };

async function launch(executorID) {
  const { DBOS } = await load("@dbos-inc/dbos-sdk");
  DBOS.setConfig({
    name: APPLICATION,
    applicationVersion: VERSION,
    executorID,
    systemDatabaseUrl: databaseUrl(),
    systemDatabasePoolSize: POOL_CONNECTIONS,
    logger,
  });
  await DBOS.launch();
  return DBOS;
}

async function install() {
  const DBOS = await launch("install");
  await DBOS.registerQueue(QUEUE, {
    workerConcurrency: WORKER_CONCURRENCY,
    minPollingIntervalMs: POLLING_MILLISECONDS,
  });
  await DBOS.registerQueue(WAITING_QUEUE);
  await DBOS.shutdown();
}

async function producer() {
  const { DBOSClient } = await load("@dbos-inc/dbos-sdk");
  const { default: pg } = await load("pg");
  const client = await DBOSClient.create({ systemDatabaseUrl: databaseUrl(), applicationName: APPLICATION, logger });
  await client.listQueues();
  const connection = new pg.Client({ connectionString: databaseUrl() });
  await connection.connect();
  const options = (work) => ({ workflowName: work, queueName: queueOf(work) });
  const slice = async (work, start, end) => {
    await connection.query("begin");
    for (const number of range(start, end))
      await client.enqueueInTransaction(connection, options(work), number, wordOf(number));
    await connection.query("commit");
  };
  return {
    bulk: (work, count) => inSlices(count, BULK_RUNS, (start, end) => slice(work, start, end)),
    single: (work, number, word) => client.enqueue(options(work), number, word),
    async close() {
      await connection.end();
      await client.destroy();
    },
  };
}

async function worker() {
  const { DBOS } = await load("@dbos-inc/dbos-sdk");
  const steps = new Steps();
  const noop = DBOS.registerStep(
    async (number) => {
      steps.effect();
      return number;
    },
    { name: "noop" },
  );
  const tell = DBOS.registerStep(async (word) => steps.marked(word), { name: "tell" });
  const first = DBOS.registerStep(async () => steps.lingerFirst(), { name: "first" });
  const second = DBOS.registerStep(async () => steps.lingerSecond(), { name: "second" });
  const chain = (length) => async (number) => {
    for (let step = 0; step < length; step += 1) number = await noop(number);
    return number;
  };
  const workflows = {
    job: async () => steps.effect(),
    one: chain(1),
    two: chain(2),
    ten: chain(10),
    mark: async (_number, word) => tell(word),
    async linger() {
      await first();
      await second();
    },
    sleep: async () => DBOS.sleep(DAY_MILLISECONDS),
  };
  for (const [name, workflow] of Object.entries(workflows)) DBOS.registerWorkflow(workflow, { name });
  await launch(`worker-${process.pid}`);
  return { stop: () => DBOS.shutdown() };
}

await main({ description, install, producer, worker });
