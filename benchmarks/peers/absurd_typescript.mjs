/**
 * Absurd for TypeScript: durable tasks in Postgres, whose parts are SQL functions.
 *
 * The npm package has no schema. `install` takes it from the package of Absurd's own administration tool, which is in
 * Python and carries it as a constant: see `schema`.
 */

import { execFileSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";

import { databaseUrl, environment, inSlices, load, main, range, Steps, wordOf } from "./contract.mjs";

const QUEUE = "bench";
const TOOL = "absurdctl==0.5.0";
const CONCURRENCY = 100;
const POOL_CONNECTIONS = 20;
const POLL_SECONDS = 0.1;
const CLAIM_SECONDS = 120;
const BULK_TASKS = 1_000;
const DEFAULT_ATTEMPTS = 5;
const DAY_SECONDS = 24 * 60 * 60;

const SPAWN = `
  select count(spawned.task_id)
  from unnest($3::jsonb[]) as each, absurd.spawn_task($1, $2, each, $4) as spawned
`;

const description = {
  name: "Absurd TypeScript",
  version: "0.5.0",
  language: "node",
  requires: ["absurd-sdk@0.5.0", "pg@8.23.1"],
  durable: true,
  sleeps: true,
  works: ["job", "one", "two", "ten", "mark", "linger", "sleep"],
  left: `select count(*) from absurd.t_${QUEUE} where state in ('pending', 'running', 'sleeping')`,
  done: `select count(*) from absurd.t_${QUEUE} where state = 'completed'`,
  settings: [
    `concurrency ${CONCURRENCY}, and batchSize of the same: a claim costs much the same for one task as for a hundred, ` +
      "and its documentation starts workers with more than the default of 1",
    `a pool of ${POOL_CONNECTIONS} connections instead of 10: each running task writes on its own, and commits of ` +
      "several connections share a flush",
    `pollInterval ${POLL_SECONDS} s instead of 0.25 s: a queue is polled and has no notification, so that the interval ` +
      "is its latency",
    `claimTimeout ${CLAIM_SECONDS} s: its default, which each checkpoint renews; a lingering step calls heartbeat() ` +
      "meanwhile, as long steps should",
    "unpartitioned storage: its default; partitions are for retention",
    `bulk by its SQL function spawn_task over an array of ${BULK_TASKS} tasks, with the SDK's default of ` +
      `${DEFAULT_ATTEMPTS} attempts: the SDK has no call for many tasks`,
  ],
  remark:
    `keeps finished tasks and their checkpoints; its npm package has no schema: install takes it from ${TOOL} of PyPI, ` +
    "which python3 -m pip puts beside the npm packages the first time",
};

/** The SQL of the schema, from the tool's package, which is put beside the npm packages the first time. */
function schema() {
  const directory = join(environment("BENCH_MODULES"), "absurdctl");
  const python = (...args) => execFileSync("python3", args, { encoding: "utf8", stdio: ["ignore", "pipe", "pipe"] });
  if (!existsSync(join(directory, "absurdctl")))
    python("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", directory, TOOL);
  const print = "import sys; sys.path.insert(0, sys.argv[1]); import absurdctl; print(absurdctl.BUNDLED_SCHEMA_SQL)";
  return python("-c", print, directory);
}

async function open(connections) {
  const { default: pg } = await load("pg");
  const { Absurd } = await load("absurd-sdk");
  const pool = new pg.Pool({ connectionString: databaseUrl(), max: connections });
  return { pool, app: new Absurd({ db: pool, queueName: QUEUE }) };
}

async function install() {
  const { pool, app } = await open(1);
  await pool.query(schema());
  await app.createQueue(QUEUE);
  await pool.end();
}

const params = (number, word) => ({ number, word });

async function producer() {
  const { pool, app } = await open(10);
  const connection = await pool.connect();
  const slice = (work, start, end) => {
    const each = range(start, end).map((number) => JSON.stringify(params(number, wordOf(number))));
    return connection.query(SPAWN, [QUEUE, work, each, { max_attempts: DEFAULT_ATTEMPTS }]);
  };
  return {
    bulk: (work, count) => inSlices(count, BULK_TASKS, (start, end) => slice(work, start, end)),
    single: (work, number, word) => app.spawn(work, params(number, word), { queue: QUEUE }),
    async close() {
      connection.release();
      await pool.end();
    },
  };
}

async function worker() {
  const { app } = await open(POOL_CONNECTIONS);
  const steps = new Steps();
  const noop = async (number) => {
    steps.effect();
    return number;
  };
  const chain =
    (length) =>
    async ({ number }, context) => {
      for (let step = 0; step < length; step += 1) number = await context.step("noop", () => noop(number));
      return number;
    };
  const tell = (context, name, body) => context.step(name, async () => (await body()) ?? null);
  const tasks = {
    job: async ({ number }) => noop(number),
    one: chain(1),
    two: chain(2),
    ten: chain(10),
    mark: ({ word }, context) => tell(context, "tell", () => steps.marked(word)),
    async linger(_params, context) {
      await tell(context, "first", () => steps.lingerFirst());
      await tell(context, "second", () => steps.lingerSecond(CLAIM_SECONDS / 3, () => context.heartbeat()));
    },
    sleep: (_params, context) => context.sleepFor("sleep", DAY_SECONDS),
  };
  for (const [name, task] of Object.entries(tasks)) app.registerTask({ name }, task);
  const running = await app.startWorker({
    concurrency: CONCURRENCY,
    batchSize: CONCURRENCY,
    pollInterval: POLL_SECONDS,
    claimTimeout: CLAIM_SECONDS,
  });
  return { stop: () => running.close() };
}

await main({ description, install, producer, worker });
