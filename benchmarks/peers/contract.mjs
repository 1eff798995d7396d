/**
 * What the programs of the Node systems have in common: the commands of README.md, the files that steps write, and
 * where the packages are.
 *
 * A program hands `main` one object:
 *
 *   description        what `describe` prints
 *   install()          makes the database ready
 *   producer()         opens a client and its connection: { bulk(work, count), single(work, number, word), close() }
 *   worker()           starts one worker and resolves when it takes work: { stop() }
 *
 * Packages come from the node_modules of the directory that BENCH_MODULES names, because imports do not read NODE_PATH.
 * They are loaded inside of these functions, so that `describe` needs none.
 */

import { openSync, readFileSync, writeSync } from "node:fs";
import { createRequire } from "node:module";
import { resolve } from "node:path";
import { setTimeout as pause } from "node:timers/promises";
import { pathToFileURL } from "node:url";

const STOP_SECONDS = 3;
const LINGER_SECONDS = 600;

/** The environment variable `name`, which must be set. */
export function environment(name) {
  const value = process.env[name];
  if (!value) throw new Error(`${name} is not set: see benchmarks/peers/README.md`);
  return value;
}

/**
 * The database's address, in a form that the WHATWG parser takes too: of `user@/name?host=/socket` it misses the host,
 * and where both are given node-postgres follows the query.
 */
export function databaseUrl() {
  return environment("BENCH_URL").replace("@/", "@localhost/");
}

/** Import the package `name` from the directory of installed packages, whichever module format it has. */
export async function load(name) {
  const require = createRequire(resolve(environment("BENCH_MODULES"), "package.json"));
  const loaded = await import(pathToFileURL(require.resolve(name)).href);
  return loaded.default?.__esModule ? loaded.default : loaded;
}

/** The numbers from `start` up to `end`, without it. */
export function range(start, end) {
  return Array.from({ length: end - start }, (_, index) => start + index);
}

/** Call `each(start, end)` for one slice after the other of at most `size` of the numbers below `count`. */
export async function inSlices(count, size, each) {
  for (let start = 0; start < count; start += size) await each(start, Math.min(start + size, count));
}

/** The word that the mark of run `number` carries. */
export function wordOf(number) {
  return `d${number}`;
}

/** The bodies of steps and jobs. Every write is one `write` to a descriptor opened with O_APPEND. */
export class Steps {
  constructor() {
    this.effects = openSync(environment("BENCH_EFFECTS"), "a");
    this.marksPath = process.env.BENCH_MARKS;
    this.marks = this.marksPath ? openSync(this.marksPath, "a") : null;
  }

  /** A no-op: one effect. */
  effect() {
    writeSync(this.effects, ".");
  }

  mark(word) {
    if (this.marks === null) throw new Error("BENCH_MARKS is not set: see benchmarks/peers/README.md");
    writeSync(this.marks, `${word} ${process.hrtime.bigint()} ${process.pid}\n`);
  }

  /** A step that tells when it ran. The mark comes first, because its time is what is measured. */
  marked(word) {
    this.mark(word);
    this.effect();
  }

  /** The first step of `linger`. */
  lingerFirst() {
    this.marked("first");
  }

  /** The second step of `linger`: the first execution waits ten minutes, and calls `alive` meanwhile; later ones return. */
  async lingerSecond(aliveEverySeconds = LINGER_SECONDS, alive = async () => {}) {
    const again = this.hasMark("second");
    this.marked("second");
    if (again) return;
    for (let waited = 0; waited < LINGER_SECONDS; waited += aliveEverySeconds) {
      await pause(aliveEverySeconds * 1000);
      await alive();
    }
  }

  /** What `linger` is where there are no steps: both in one job. */
  async linger() {
    this.lingerFirst();
    await this.lingerSecond();
  }

  hasMark(word) {
    const lines = readFileSync(this.marksPath, "utf8").split("\n");
    return lines.some((line) => line.startsWith(`${word} `));
  }
}

async function enqueue(system, work, count, how) {
  const producer = await system.producer();
  const started = process.hrtime.bigint();
  if (how === "bulk") await producer.bulk(work, count);
  else for (let number = 0; number < count; number += 1) await producer.single(work, number, wordOf(number));
  const seconds = Number(process.hrtime.bigint() - started) / 1e9;
  console.log(JSON.stringify({ seconds }));
  await producer.close();
}

/**
 * Enqueue at a fixed rate, and late calls at once. No call waits for the one before, so that a slow one does not hide
 * the latency of those that are due meanwhile.
 */
async function drip(system, count, rate) {
  const producer = await system.producer();
  const calls = [];
  const started = process.hrtime.bigint();
  for (let number = 0; number < count; number += 1) {
    const dueNanoseconds = started + BigInt(Math.round((number * 1e9) / rate));
    const earlyMilliseconds = Number(dueNanoseconds - process.hrtime.bigint()) / 1e6;
    if (earlyMilliseconds > 0) await pause(earlyMilliseconds);
    const word = wordOf(number);
    process.stdout.write(`${word} ${process.hrtime.bigint()}\n`);
    calls.push(producer.single("mark", number, word));
  }
  await Promise.all(calls);
  await producer.close();
}

/** Run one worker until SIGTERM. What runs has STOP_SECONDS to end; a lingering step is left as a kill would leave it. */
async function work(system) {
  const asked = new Promise((resolve) => process.once("SIGTERM", resolve));
  const worker = await system.worker();
  process.stdout.write("ready\n");
  await asked;
  await Promise.race([worker.stop(), pause(STOP_SECONDS * 1000)]);
  process.exit(0);
}

function positive(text, what) {
  const number = Number(text);
  if (!(number > 0)) throw new Error(`${what} must be a positive number, not ${text}`);
  return number;
}

function known(system, name) {
  if (!system.description.works.includes(name)) throw new Error(`${system.description.name} has no work ${name}`);
  return name;
}

/** Carry out the command of the command line. */
export async function main(system) {
  const [command, ...args] = process.argv.slice(2);
  switch (command) {
    case "describe":
      return console.log(JSON.stringify(system.description));
    case "install":
      return await system.install();
    case "enqueue": {
      const [name, count, how] = args;
      if (how !== "bulk" && how !== "single") throw new Error(`enqueue bulk or single, not ${how}`);
      return await enqueue(system, known(system, name), positive(count, "COUNT"), how);
    }
    case "drip":
      return await drip(system, positive(args[0], "COUNT"), positive(args[1], "RATE"));
    case "work":
      return await work(system);
    default:
      throw new Error("commands: describe, install, enqueue WORK COUNT bulk|single, drip COUNT RATE, work");
  }
}
