"""What `tests.mutations` turns off, one at a time, and the tests that ought to notice.

Each mutant is the naive version of a guard, as small as it can be. `replaced` is found exactly once in its file, or
the script says so: then the code has moved on, and this list has to follow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

SCHEMA = "schema.sql"
LIVENESS = "worker/supervision/liveness.py"
COMMITTER = "worker/engine/committer.py"
CLAIMED = "worker/engine/claimed.py"
PATIENTLY = "outbox/queries/patiently.sql"


@dataclass(frozen=True)
class Edit:
    """One replacement in one file."""

    file: str
    replaced: str
    by: str


@dataclass(frozen=True)
class Mutant:
    """A guard that is off. `tests` are what pytest takes: files, or single tests in them."""

    guard: str
    off: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]


def mutant(guard: str, off: str, file: str, replaced: str, by: str, *tests: str) -> Mutant:
    return Mutant(guard, off, (Edit(file, replaced, by),), tests)


def integration(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/integration/test_{file}.py::test_{name}" for name in names)


def migrating(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/upgrade/test_migrating.py::test_{name}" for name in names)


def unit(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/unit/test_{file}.py::test_{name}" for name in names)


WRONG_FENCE = integration("protocol_fence", "a_transition_with_a_wrong_fence_writes_nothing")
CROSSED = integration(
    "holes",
    "two_flushes_of_steps_with_crossed_parents_both_come_through",
    "a_flush_of_a_run_and_one_of_its_step_that_both_know_each_other_come_through",
)
LEFT_IN_A_BUFFER = integration("holes", "a_claim_left_in_the_socket_buffer_of_a_dead_worker_claims_nothing")
SENT_AGAIN = integration("holes", "a_flush_of_one_is_sent_again_as_it_was_when_its_connection_is_lost")
OUTAGE = integration("holes", "an_outage_longer_than_the_lease_reclaims_nobody")
COMES_BACK_LAST = integration(
    "supervisor", "a_supervisor_that_comes_back_last_from_an_outage_is_not_held_for_dead"
)

FENCE = [
    mutant(
        "fence (I8)", "not tested at all", SCHEMA,
        "case when t.attempt = x.attempt and t.claimed_by = me then\n"
        "                  case when t.position > x.position then 2 when t.position < x.position then 0\n",
        "case when t.id is not null then\n                  case when false then 0\n",
        *WRONG_FENCE,
    ),
    mutant(
        "fence (I8)", "without the attempt", SCHEMA,
        "case when t.attempt = x.attempt and t.claimed_by = me then",
        "case when t.claimed_by = me then",
        *WRONG_FENCE,
    ),
    mutant(
        "fence (I8)", "without the worker", SCHEMA,
        "case when t.attempt = x.attempt and t.claimed_by = me then",
        "case when t.attempt = x.attempt then",
        *WRONG_FENCE,
        *integration("protocol_fence", "a_claim_that_was_reclaimed_writes_nothing"),
    ),
    mutant(
        "fence (I8)", "without the run", SCHEMA,
        "left join tasks t on t.id = any (locking) and t.id = x.task and t.run_id = x.run_id\n",
        "left join tasks t on t.id = any (locking) and t.id = x.task\n",
        *WRONG_FENCE,
        *integration("protocol_fence", "a_claim_of_a_run_that_a_restore_has_taken_away_writes_nothing_over_one_with_its_id"),
    ),
    mutant(
        "fence (I8)", "without the call", SCHEMA,
        "and (x.parent is null or x.doing is null or t.path = x.doing);", ";",
        *integration("protocol_fence", "a_claim_of_a_call_writes_nothing_over_another_one_that_got_its_id_in_a_restore"),
    ),
    mutant(
        "fence (I8)", "without the position", SCHEMA,
        "case when t.position > x.position then 2 when t.position < x.position then 0\n",
        "case when false then 0\n",
        *WRONG_FENCE,
        *integration("protocol_fence", "a_resend_is_answered_already_and_writes_nothing"),
    ),
    mutant(
        "fence (I8)", "not asked at the commit of a transaction", SCHEMA,
        "if verdict % 4 <> 1 then", "if false then",
        *integration("protocol_commit_step", "a_lost_claim_takes_the_writes_of_the_user_along"),
    ),
]  # fmt: skip

LOCK = "perform 1 from tasks t where t.id = any (locking) order by t.id for update;"
LOCKS = [
    mutant(
        "ordered lock", "in the order in which it was sent", SCHEMA,
        LOCK, LOCK.replace("order by t.id", "order by array_position(locking, t.id)"),
        *integration("protocol_fence", "two_flushes_with_the_same_tasks_in_opposite_order_do_not_deadlock"),
        *CROSSED,
    ),
    mutant(
        "ordered lock", "without the parents", SCHEMA,
        "locking := locking || parents;", "null;",
        *CROSSED, *integration("protocol_calls", "many_workers_draw_seq_without_gaps_and_wake_each_run_once"),
    ),
    mutant(
        "ordered lock", "no lock", SCHEMA, LOCK, "null;",
        *integration("protocol_fence", "a_flush_that_waited_sees_what_it_waited_for"),
    ),
]  # fmt: skip

OWN_ROW = "perform 1 from workers w where w.id = me and w.dead_at is null for key share;"
DEATH = [
    mutant(
        "key share on the worker's row (I3)", "looked at, not locked", SCHEMA,
        OWN_ROW, OWN_ROW.replace(" for key share", ""),
        *integration("protocol_claims", "a_claim_that_waits_for_the_burial_is_refused"),
    ),
    mutant(
        "key share on the worker's row (I3)", "locked, not looked at", SCHEMA,
        OWN_ROW, OWN_ROW.replace(" and w.dead_at is null", ""),
        *LEFT_IN_A_BUFFER,
    ),
    mutant(
        "key share on the worker's row (I3)", "neither", SCHEMA,
        f"{OWN_ROW}\n    if not found then", "if false then",
        *LEFT_IN_A_BUFFER,
    ),
    mutant(
        "a burial waits for a claim (I11)", "it does not", SCHEMA,
        "perform 1 from workers w where w.id = dead for update;",
        "perform 1 from workers w where w.id = dead;",
        *integration("protocol_reclaim", "a_burial_waits_for_a_claim_under_way_and_then_finds_its_tasks"),
    ),
    mutant(
        "nobody is reclaimed who was not buried (I11)", "anybody is", SCHEMA,
        "if exists (select from workers w where w.id = dead and w.dead_at is null) then", "if false then",
        *integration("protocol_reclaim", "nothing_is_taken_from_a_worker_that_was_not_buried"),
    ),
    mutant(
        "a worker is counted as dead once", "by each that buries it", SCHEMA,
        "if found and detector is not null then", "if detector is not null then",
        *integration(
            "exporter", "a_worker_that_several_declare_dead_is_counted_once_under_what_noticed_it_first"
        ),
    ),
    mutant(
        "a burial ends the backend that does not let it", "it waits", LIVENESS,
        "            # A claim that cannot end: its client is stopped in the middle of a large answer.\n"
        "            await end_backends(connection, worker_id)\n", "            pass\n",
        *integration(
            "liveness", "a_claim_that_cannot_end_is_terminated",
            "a_claim_whose_client_reads_no_more_is_terminated",
        ),
    ),
    Mutant(
        "a reclaim ends what is on the wire", "it waits for it",
        (
            Edit(
                LIVENESS,
                "    await _let_statements_end(connection, worker_id)\n"
                "    await end_backends(connection, worker_id)\n",
                "",
            ),
            Edit(
                LIVENESS,
                "by a backend that is ending, or by one to end\n"
                "            await end_backends(connection, worker_id)\n",
                "by a backend\n",
            ),
        ),
        integration("liveness", "a_flush_that_is_on_the_wire_does_not_keep_its_tasks"),
    ),
    mutant(
        "a reclaim lets a flush end that is being applied", "it cuts it off", LIVENESS,
        "    await _let_statements_end(connection, worker_id)\n", "",
        *integration("liveness", "a_flush_that_is_being_applied_comes_through"),
    ),
    mutant(
        "only what dies alone is poison", "also what dies in company", SCHEMA,
        "f.kind = 'run' and f.solo and f.solo_deaths + 1 >= poison_after",
        "f.kind = 'run' and f.solo_deaths + 1 >= 1",
        *integration("protocol_reclaim", "innocent_neighbours_of_a_poison_are_never_blocked"),
    ),
]  # fmt: skip

BY_TIME_STAMPS = (
    Edit(
        "worker/queries/beat.sql",
        "set beat = w.beat + 1",
        "set beat = w.beat + 1, started_at = clock_timestamp()",
    ),
    Edit(
        "worker/queries/observe.sql",
        "w.host, w.pid",
        "extract(epoch from clock_timestamp() - w.started_at)::text, w.pid",
    ),
    Edit(
        LIVENESS,
        "        if seen.locking and not seen.locked and absent >= self._lost_lock_seconds:",
        "        silent = float(seen.host)\n"
        "        if not seen.locked and silent >= self._lost_lock_seconds:",
    ),
    Edit(
        "worker/supervision/heartbeat.py",
        "settle_seconds = 0.0 if self._attempts == 1 else LONGEST_WAIT_SECONDS",
        "settle_seconds = 0.0",
    ),
)
OBSERVER = [
    Mutant("observer", "goes by time stamps in the database", BY_TIME_STAMPS, OUTAGE),
    mutant(
        "observer", "goes on with what it saw before the connection broke", "worker/supervision/heartbeat.py",
        "observer = Observer(self._settings, settle_seconds=settle_seconds)",
        'observer = vars(self).setdefault("_kept", Observer(self._settings))',
        *COMES_BACK_LAST,
    ),
    mutant(
        "observer", "judges before the others can be back", "worker/supervision/heartbeat.py",
        "settle_seconds = 0.0 if self._attempts == 1 else LONGEST_WAIT_SECONDS", "settle_seconds = 0.0",
        *COMES_BACK_LAST,
    ),
    mutant(
        "observer", "counts time in which it saw nothing", "worker/supervision/watchdog.py",
        "self._seconds += min(now - self._seen_at, self._longest_gap_seconds)",
        "self._seconds += now - self._seen_at",
        *unit("watchdog", "an_observer_that_was_away_has_seen_nothing"),
    ),
    mutant(
        "observer", "takes a lock that came back for one that was lost", LIVENESS,
        "None if seen.locked else seen.beat, now", "seen.beat, now",
        *unit("watchdog", "a_lock_that_is_lost_late_counts_from_when_it_was_lost"),
    ),
    mutant(
        "observer", "judges its own", LIVENESS,
        "if each.worker_id not in own]", "]",
        *unit("watchdog", "own_workers_are_not_judged"),
    ),
    mutant(
        "observer", "judges by one look", LIVENESS,
        "if seen.locking and not seen.locked and absent >= self._lost_lock_seconds:", "if not seen.locked:",
        *unit("watchdog", "a_worker_that_beats_is_alive_without_its_lock"),
    ),
]  # fmt: skip

RESENDS = [
    mutant(
        "verbatim resend (I10)", "not sent again", COMMITTER,
        "return await retry_connecting_async(once, give_up_after_seconds=None)", "return await once()",
        *SENT_AGAIN,
    ),
    mutant(
        "verbatim resend (I10)", "taken for applied", COMMITTER,
        "                        await self.close()\n                        raise\n",
        "                        await self.close()\n                        return [2] * len(writings)\n",
        *integration("engine_commits", "a_flush_whose_backend_dies_is_resent"),
    ),
    mutant(
        "verbatim resend (I10)", "written down anew, at another moment", COMMITTER,
        "                    cursor = await self._connection.execute(statement, parameters, prepare=True, binary=True)",
        "                    sent = getattr(self, '_sent', None) is writings\n"
        "                    self._sent = writings\n"
        "                    for writing in writings if sent else ():\n"
        "                        for record in writing.records:\n"
        "                            record.at = type(record.at).now(record.at.tzinfo)\n"
        "                    cursor = await self._connection.execute(\n"
        "                        statement, (self._worker_id, *encode(writings)), prepare=True, binary=True\n"
        "                    )",
        *SENT_AGAIN,
    ),
    mutant(
        "a resend is answered from the history (I10)", "it is not", SCHEMA,
        "if verdicts && array[0, 4, 8, 12] then", "if false then",
        *integration("protocol_fence", "a_resend_is_answered_already_when_the_run_has_gone_on"),
    ),
    mutant(
        "a resend is answered from the history (I10)", "whenever it was written", SCHEMA,
        "where (me, r.at) = (select o.worker, o.at from stepwell.outbox o",
        "where me = (select o.worker from stepwell.outbox o",
        *integration(
            "protocol_fence",
            "a_stale_claim_does_not_take_the_records_of_its_workers_next_claim_for_its_own",
        ),
    ),
    mutant(
        "a lost answer to COMMIT is asked for", "it counts as rolled back", CLAIMED,
        "if receipt.verdict is Verdict.ALREADY and await", "if receipt.verdict is None and await",
        *integration("engine_transaction_faults", "a_commit_whose_answer_is_lost_is_not_repeated"),
    ),
    mutant(
        "a lost answer to COMMIT is asked for", "a resent question counts as committed", CLAIMED,
        "if receipt.verdict is Verdict.ALREADY and await self._is_recorded(step.path):",
        "if receipt.verdict is Verdict.ALREADY:",
        *integration(
            "holes",
            "a_step_that_was_rolled_back_at_commit_is_repeated_although_the_question_was_resent",
        ),
    ),
    mutant(
        "strays of a claim without an answer are given back", "they are not", "worker/engine/caretaker.py",
        "for stray in strays & self._suspicious:", "for stray in strays - strays:",
        *integration(
            "holes", "what_a_claim_took_whose_answer_was_lost_is_executed_once_and_by_the_same_worker"
        ),
    ),
]  # fmt: skip

BISECTION = [
    mutant(
        "bisection (I16)", "all of a refused flush are refused", COMMITTER,
        "            if len(batch) == 1:\n"
        "                _answer(batch[0][1], Receipt(Verdict.FENCED, refused=_said(error)))\n",
        "            if batch:\n"
        "                for _, future in batch:\n"
        "                    _answer(future, Receipt(Verdict.FENCED, refused=_said(error)))\n",
        *integration("engine_commits", "one_bad_value_blocks_its_run_and_nobody_elses"),
    ),
    mutant(
        "bisection (I16)", "one by one", COMMITTER,
        "half = len(batch) // 2", "half = 1",
        *integration(
            "holes",
            "one_value_that_is_refused_stops_none_of_the_499_others_and_is_found_by_halving",
        ),
    ),
    mutant(
        "bisection (I16)", "sent again as it is", COMMITTER,
        "                    if is_bad_data(error):\n                        raise\n", "",
        *integration("engine_commits", "a_value_that_is_no_json_spoils_its_own_run_only"),
    ),
]  # fmt: skip

QUEUE = [
    mutant(
        "compare-and-park (I5)", "it parks whatever came meanwhile", SCHEMA,
        "when x.then = 'park' and t.wakeups = x.wakeups and", "when x.then = 'park' and",
        *integration("protocol_signals", "a_signal_between_claim_and_park_readies_the_run_at_once"),
    ),
    mutant(
        "strict", "records out of order are taken", SCHEMA,
        "when x.strict and t.seq <> x.seen then 3 else 1 end", "else 1 end",
        *integration("protocol_calls", "a_strict_write_is_refused_when_something_else_was_recorded"),
    ),
    mutant(
        "doorbell: rung for the idle only (I1)", "always", SCHEMA,
        "where (d.queue = on_queue or on_queue = 'stepwell') and d.until > clock_timestamp()) then",
        "where (d.queue = on_queue or on_queue = 'stepwell') and d.until > clock_timestamp()) or true then",
        *integration("protocol_claims", "a_busy_system_sends_no_notify"),
    ),
    mutant(
        "doorbell: the lease ends", "it does not", SCHEMA,
        " and d.until > clock_timestamp()) then", ") then",
        *integration("protocol_claims", "a_busy_system_sends_no_notify", "a_lease_can_be_renewed"),
    ),
    mutant(
        "doorbell: a claim that finds work ends the lease", "it does not", SCHEMA,
        "    delete from doorbell d where d.worker = me;\n", "",
        *integration("protocol_claims", "a_claim_that_finds_work_ends_the_lease"),
    ),
    mutant(
        "a worker hoards nothing (I2)", "it does", "worker/engine/engine.py",
        "free = self._settings.concurrency - len(self._flying)", "free = self._settings.concurrency",
        *integration("engine_claims", "never_more_runs_are_in_flight_than_there_are_slots"),
    ),
    mutant(
        "a lower bound on turns", "none", "worker/engine/claims.py",
        'if claim.kind in ("run", "step") and claim.turn >= floors[claim.group]:', "if not claim.task:",
        *integration("protocol_claims", "a_slow_committer_is_hidden_no_longer_than_a_floor_lives"),
    ),
    mutant(
        "what a producer runs only inserts (I15)", "a wake locks its run", SCHEMA,
        "    values (run, 'wake', fact, 'stepwell', 0, false, args);\n",
        "    values (run, 'wake', fact, 'stepwell', 0, false, args);\n"
        "    perform 1 from tasks t where t.run_id = wake.run and t.kind = 'run' for update;\n",
        *integration(
            "holes", "what_a_service_leaves_open_holds_up_no_worker_and_takes_place_when_it_commits"
        ),
    ),
    mutant(
        "one final outcome (I9)", "as many as come", SCHEMA,
        "    primary key (run_id, epoch, path, n),\n    constraint outbox_kind_known",
        "    constraint outbox_kind_known",
        *integration(
            "protocol_fence", "a_second_final_outcome_is_refused_and_with_it_the_whole_flush"
        ),
    ),
    mutant(
        "values are json", "jsonb", SCHEMA,
        "    value       json,\n    error       json,\n    worker      bigint,",
        "    value       jsonb,\n    error       json,\n    worker      bigint,",
        *integration("protocol_json", "a_value_is_recorded_and_put_out_as_it_was_sent"),
    ),
]  # fmt: skip

STEPS = [
    mutant(
        "canary of transactional steps", "not looked at", SCHEMA,
        "if current_setting('stepwell.canary', true) is distinct from canary then", "if false then",
        *integration(
            "protocol_commit_step", "a_step_that_ended_its_transaction_is_found_out"
        ),
    ),
    mutant(
        "a raw commit of a step is refused", "it is not", "worker/steps/transactions.py",
        "    driver.commit = driver.rollback = forbidden\n",
        "    driver.commit, driver.rollback = driver.commit, driver.rollback\n",
        *integration("engine_transactions", "a_raw_commit_or_rollback_of_a_connection_is_refused"),
    ),
    mutant(
        "a step that committed and then failed is not repeated", "it is", "worker/steps/transactions.py",
        "                attempt.learn(cursor.execute(_FATE, (transaction,)).fetchone())\n", "                pass\n",
        *integration(
            "engine_transactions", "a_step_that_commits_by_sql_and_then_fails_is_not_executed_again"
        ),
    ),
    mutant(
        "a step starts when the one before is durable (I7)", "it does not wait", CLAIMED,
        "                receipt = await self._means.committer.commit(writing)\n"
        "                if receipt.refused is not None and isinstance",
        "                answer = self._means.committer.commit(writing)\n"
        "                if type(turn.decision) is DoStep:\n"
        "                    self._standing.applied(writing)\n"
        "                    return await self._execute(turn.decision, turn.wait_seconds)\n"
        "                receipt = await answer\n"
        "                if receipt.refused is not None and isinstance",
        *integration(
            "engine_commits", "a_step_starts_only_when_the_completion_before_it_is_durable"
        ),
    ),
    Mutant(
        "a body sees decoded text (I12)", "what the step returned",
        (
            Edit("worker/steps/execution.py", 'T = TypeVar("T")\n', 'T = TypeVar("T")\nKEPT = {}\n'),
            Edit(
                "worker/steps/execution.py",
                "        return self.step.signature.encode_result(\n"
                "            value, where=self.step.result_where, max_bytes=self.max_bytes\n"
                "        )\n",
                "        text = self.step.signature.encode_result(\n"
                "            value, where=self.step.result_where, max_bytes=self.max_bytes\n"
                "        )\n"
                "        KEPT[text] = value\n"
                "        return text\n",
            ),
            Edit(
                "worker/replay/calls.py",
                "            return step.signature.decode_result(",
                "            from worker.steps.execution import KEPT\n"
                "            if record.value in KEPT:\n"
                "                return KEPT[record.value]\n"
                "            return step.signature.decode_result(",
            ),
        ),
        integration("holes", "a_body_sees_at_once_what_a_replay_would_see"),
    ),
    mutant(
        "a body has no event loop", "it finds the engine's", "worker/engine/sandbox.py",
        "_set_running_loop(_LOOP)", "pass",
        "tests/unit/test_sandbox.py",
    ),
    mutant(
        "other arguments are drift", "they block", "worker/replay/course.py",
        "if self._workflow.strict:", "if self._workflow.name:",
        *integration(
            "engine_blocks", "other_arguments_are_drift_which_only_a_strict_workflow_blocks"
        ),
    ),
    mutant(
        "a history is in the order in which things happened",
        "in that of its calls",
        "worker/replay/records.py",
        "sorted(history, key=_by_seq)",
        "sorted(history, key=lambda record: (record.path, record.n))",
        *integration("holes", "branches_that_append_to_one_list_replay_as_they_ran"),
    ),
]  # fmt: skip


def before_a_model(file: str, *mutants: tuple[str, str]) -> list[Mutant]:
    """Have a model of the protocol alone notice what other tests are written for."""
    named = {(each.guard, each.off): each for each in (*FENCE, *DEATH, *RESENDS, *QUEUE)}
    tests = (f"tests/integration/test_{file}.py",)
    return [replace(named[each], off=f"{each[1]}, before {file}", tests=tests) for each in mutants]


MODELS = [
    *before_a_model(
        "protocol_model",
        ("fence (I8)", "without the position"),
        ("fence (I8)", "without the attempt"),
        ("fence (I8)", "without the worker"),
        ("key share on the worker's row (I3)", "looked at, not locked"),
        ("key share on the worker's row (I3)", "locked, not looked at"),
        ("a resend is answered from the history (I10)", "it is not"),
        ("compare-and-park (I5)", "it parks whatever came meanwhile"),
        ("doorbell: rung for the idle only (I1)", "always"),
        ("what a producer runs only inserts (I15)", "a wake locks its run"),
        ("one final outcome (I9)", "as many as come"),
    ),
    *before_a_model(
        "protocol_calls_model",
        ("fence (I8)", "without the position"),
        ("fence (I8)", "without the attempt"),
        ("a resend is answered from the history (I10)", "it is not"),
        ("compare-and-park (I5)", "it parks whatever came meanwhile"),
    ),
]

FEW_PAGES = integration(
    "protocol_reading",
    "under_an_old_open_transaction_a_claim_reads_as_little_behind_2000_done_tasks_as_behind_few",
)
STRANGERS = integration(
    "protocol_reading",
    "a_worker_sets_aside_what_nobody_knows_and_the_registration_of_one_who_does_brings_it_back",
)
CLAIM_GUARDS = (
    "    set enable_sort = off set enable_seqscan = off set enable_bitmapscan = off\n"
    "    set enable_nestloop = off set enable_mergejoin = off set jit = off\n"
)
CLAIM_BODY = "as $$\n#variable_conflict use_column\ndeclare\n    ids     bigint[];"

READING = [
    mutant(
        "a lower bound on turns", "the claim does not look at it", SCHEMA,
        " and t.turn >= floors[g + 1] and", " and", *FEW_PAGES,
    ),
    mutant(
        "what nobody knows is set aside", "it stands in the way", "worker/engine/caretaker.py",
        "while await self._claimant.shelve(queue, SET_ASIDE_AT_MOST) >= SET_ASIDE_AT_MOST:", "while False:",
        *STRANGERS,
    ),
    mutant(
        "what nobody knows is set aside", "a newcomer does not bring it back", SCHEMA,
        "    perform unshelve_v1(my_queues, my_names, 10000);\n", "", *STRANGERS,
    ),
    mutant(
        "statistics of a busy system", "the installation leaves none", "outbox/migrations/__init__.py",
        'sql, *recorded, load("prime_statistics"), "commit")', 'sql, *recorded, "commit")',
        *integration(
            "plans", "on_tables_that_were_never_analysed_a_list_reads_a_page_thanks_to_what_the_installation_left"
        ),
    ),
    mutant(
        "the planner settings of a claim", "left to the planner", SCHEMA, CLAIM_GUARDS + CLAIM_BODY, CLAIM_BODY,
        *integration("plans", "without_its_guards_a_claim_reads_the_whole_backlog"),
    ),
    mutant(
        "values are json", "signals are jsonb", SCHEMA, "    payload json,", "    payload jsonb,",
        *integration("protocol_json", "a_signal_is_kept_as_it_was_sent"),
    ),
    mutant(
        "values are json", "outputs are jsonb", SCHEMA, "    output      json,\n    error", "    output      jsonb,\n    error",
        *integration("protocol_json", "a_value_is_recorded_and_put_out_as_it_was_sent"),
    ),
]  # fmt: skip

SESSIONS = [
    mutant(
        "a step's commit is durable", "it says itself whether", SCHEMA,
        "has asked for (I7).\n"
        "    if current_setting('synchronous_commit') in ('off', 'local') then\n        perform set_config('synchronous_commit', 'on', true);\n    end if;\n",
        "has asked for (I7).\n",
        *integration(
            "engine_transaction_sessions", "a_step_cannot_have_its_completion_lost_by_a_commit_that_is_not_durable"
        ),
    ),
    mutant(
        "what a step sets is undone", "the next one finds it", "outbox/sessions.py",
        "    return f\"{load('reset_session')};\\n{load('session_settings')}\"", '    return "select 1"',
        *integration(
            "engine_transaction_sessions", "whatever_a_step_does_to_its_session_the_next_one_finds_it_as_it_was"
        ),
    ),
    mutant(
        "a backend is found by its lock", "by its name alone", "worker/queries/backends.sql",
        " or a.pid in (select m.pid from marked m)", "",
        *integration(
            "engine_transaction_sessions",
            "a_step_that_renames_its_session_is_still_found_by_those_who_have_to_end_it",
        ),
    ),
    mutant(
        "the fence of a step beside another", "one of a task lets both through", SCHEMA,
        "    where t.id = any (own) and t.id = x.task and verdicts[x.i] % 4 = 1\n      and (x.then",
        "    where t.id = any (own) and t.id = x.task\n      and (x.then",
        *integration(
            "protocol_calls", "a_stale_transition_does_nothing_beside_the_current_one_of_the_same_step"
        ),
    ),
    mutant(
        "what was executed is kept when the history has gone on", "it is executed again", "worker/engine/advance.py",
        'tuple(record for record in refused.records if record.kind == "step")', "()",
        *integration(
            "engine_calls",
            "a_step_is_executed_once_though_others_are_recorded_beside_it",
            "how_a_cancellation_cut_a_step_is_recorded_though_others_are_recorded_beside_it",
        ),
    ),
    mutant(
        "an undo is not cut short", "a cancellation cuts it like any step", CLAIMED,
        "step.step.is_async and not is_undo(step.path)", "step.step.is_async",
        *integration("engine_cancels", "an_undo_is_not_cut_short"),
    ),
    mutant(
        "an undo is numbered on", "a cancellation forgets how often it was executed", "worker/engine/advance.py",
        "earlier=(*known.earlier, *here)", "earlier=step.earlier",
        *integration("engine_cancels", "an_undo_in_which_a_worker_died_goes_on_when_the_run_is_cancelled"),
    ),
    mutant(
        "what is undone after waiting is new", "it is taken for begun", "worker/replay/driver.py",
        "        self._settling = None\n        self._live = True\n", "        self._settling = None\n",
        *integration("engine_calls", "what_completed_while_its_run_was_failing_is_undone_in_the_queue_of_its_undo"),
    ),
    mutant(
        "a window goes on where it was", "it begins with the first items, done or not", "worker/engine/spreading.py",
        "return sorted(left)[: window.limit][-1]", "return window.limit",
        *integration("engine_calls", "a_run_that_is_retried_goes_on_in_the_middle_of_its_window"),
    ),
    mutant(
        "a child that is begun again tells anew", "what it said before is believed", "worker/engine/mailbox.py",
        "if isinstance(call, AwaitChild) and self._replay.begins(call.of) and name in self._mail:",
        "if False:",
        *integration("engine_children", "a_started_child_that_was_cancelled_with_its_parent_goes_on_with_it"),
    ),
    mutant(
        "calls in flight are settled once", "whenever an undo is resumed", "worker/replay/driver.py",
        "if paths and not begun:", "if paths:",
        *unit("replay_undo", "an_undo_that_has_begun_is_resumed_wherever_it_was_interrupted"),
    ),
]  # fmt: skip

MIGRATING = [
    mutant(
        "nobody waits behind a migration", "it waits until it gets its lock", PATIENTLY,
        "perform set_config('lock_timeout', 50 / greatest(cardinality(tables), 1) || 'ms', true);", "",
        *migrating("nobody_waits_for_a_migration_that_waits_for_an_open_transaction"),
    ),
    mutant(
        "a vacuum gives way to a migration", "it is waited for as anybody else", PATIENTLY,
        "execute format('lock table stepwell.%I in share update exclusive mode', one);", "null;",
        *migrating("an_autovacuum_gives_way_to_a_migration"),
    ),
    mutant(
        "whoever waits to migrate holds nothing", "it waits in the database", "outbox/schema.py",
        '"select pg_try_advisory_lock(%s)"', '"select pg_advisory_lock(%s) is not null"',
        *migrating("an_index_is_built_while_others_wait_for_their_turn_to_migrate"),
    ),
]  # fmt: skip

POOLER = [
    mutant(
        "what was given back to newer workers is left to them", "it is claimed again at once", "worker/engine/claimed.py",
        "        self._means.leave(self.claim.name)\n", "        pass\n",
        *integration("encryption", "what_an_old_worker_has_given_back_it_leaves_to_newer_ones_however_seldom_they_look"),
    ),
    mutant(
        "behind a pooler nothing is prepared", "as anywhere", "outbox/sessions.py",
        '    row = connection.execute(load("session_backend"), _introduction(connection, application_name)).fetchone()\n'
        "    if row is not None and row[0]:\n        connection.prepare_threshold = None\n",
        '    row = connection.execute(load("session_backend"), _introduction(connection, application_name)).fetchone()\n'
        "    if row is not None and row[0]:\n        pass\n",
        *integration("pooler", "a_pooler_is_known_for_one_and_nothing_is_prepared_there"),
    ),
    mutant(
        "behind a pooler a session bears no worker's name", "it does", "outbox/sessions.py",
        "    name = POOLED_WORKER if _WORKER.fullmatch(application_name) else application_name\n",
        "    name = application_name\n",
        *integration(
            "pooler", "no_session_of_the_pool_bears_the_name_of_a_worker",
            "a_backend_that_serves_somebody_else_by_now_is_left_alone",
        ),
    ),
    mutant(
        "what a step sets in a pooler's session is undone with its COMMIT", "it stays", "outbox/sessions.py",
        "commit;\\n{_reset_lent()}", "commit;\\n{load('pooled_settings')}",
        *integration("pooler", "whatever_a_step_does_to_its_session_nobody_else_finds[psycopg.AsyncConnection]"),
    ),
    mutant(
        "… and with its ROLLBACK", "a lock stays", "outbox/sessions.py",
        "    if not is_pooled(connection):\n        await connection.rollback()\n        return\n",
        "    if True:\n        await connection.rollback()\n        return\n",
        *integration("pooler", "nor_what_a_step_has_done_that_failed[psycopg.AsyncConnection]"),
    ),
    mutant(
        "a flush is durable whatever the role says", "as the role says", SCHEMA,
        "has asked for (I7).\n    if current_setting('synchronous_commit') in ('off', 'local') then",
        "has asked for (I7).\n    if false then",
        *integration("pooler", "a_completion_is_durable_whatever_the_role_has_for_its_default[off]"),
    ),
    mutant(
        "without a session the lease alone counts", "a lock that nobody could hold is missed", LIVENESS,
        "if seen.locking and not seen.locked and", "if not seen.locked and",
        *integration("pooler", "a_pause_of_the_pooler_kills_nobody_whose_lease_holds"),
        *unit("watchdog", "a_worker_whose_supervisor_can_hold_no_lock_is_judged_by_its_lease"),
    ),
    mutant(
        "a claim is known by a lock", "by the name of its session", SCHEMA,
        "    perform pg_try_advisory_xact_lock_shared(-me);\n    perform 1 from workers w", "    perform 1 from workers w",
        *integration("pooler", "a_claim_that_cannot_end_is_ended_and_nobody_elses_transaction"),
    ),
    mutant(
        "who cannot be rung polls", "he asks to be rung", "worker/engine/engine.py",
        "asks = self._doorbell.hears\n", "asks = True\n",
        *integration("pooler", "an_idle_worker_without_a_session_of_its_own_polls_and_asks_nobody_to_ring"),
    ),
    mutant(
        "of exporters without a session one exports", "all do", "worker/telemetry/exporter.py",
        'connection.execute(load("exporter_lease"), lease).fetchone() is not None', "True",
        *integration("pooler", "of_exporters_without_a_session_one_exports_and_the_next_follows"),
    ),
    mutant(
        "an answer out of turn is a lost connection", "it is the step's failure", "outbox/database.py",
        "    if isinstance(error, psycopg.InternalError):\n", "    if False:\n",
        *integration("database", "an_answer_that_nobody_has_asked_for_is_a_disconnect"),
    ),
    mutant(
        "a pool begins anew", "it waits twice as long each time", "outbox/pools.py",
        "AGAIN_SECONDS = 3.0", "AGAIN_SECONDS = 300.0",
        *integration("max_connections", "pools_find_room_as_soon_as_there_is_however_long_there_was_none"),
    ),
]  # fmt: skip

MUTANTS = [
    *FENCE,
    *LOCKS,
    *DEATH,
    *OBSERVER,
    *RESENDS,
    *BISECTION,
    *QUEUE,
    *STEPS,
    *MODELS,
    *READING,
    *SESSIONS,
    *MIGRATING,
    *POOLER,
]
