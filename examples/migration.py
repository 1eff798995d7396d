"""Change workflows while runs are open: a patch for a small change, a version for a new plan.

    stepwell worker examples/migration.py
    stepwell enqueue onboard '{"user": "Ada"}'
    stepwell enqueue close_account '{"user": "Ada"}' --version 2 --wait
    stepwell replay examples/migration.py

The last command, before a deploy, drives the histories of open runs against the code, and says which would be blocked.
"""

from worker import patched, retire_patch, sleep, step, workflow

MONTH = 30 * 86400


@step
async def create_account(user: str) -> None:
    print(f"account for {user}")


@step
async def send_mail(user: str, text: str) -> None:
    """Stands for your mail provider's client."""
    print(f"mail to {user}: {text}")


@step
async def book_call(user: str) -> None:
    print(f"call with {user}")


@workflow
async def onboard(user: str) -> None:
    # Last year this patch let the account come before the mail. All runs of before have ended, so the old way could be
    # removed; a run that did go it is blocked here. When no run that has passed here is open, the line can go as well.
    retire_patch("account-first")
    await create_account(user)
    await send_mail(user, "welcome")
    await sleep(MONTH)
    # New this month. Runs that have come by here already go the old way, in every replay; all others the new one.
    if patched("call-instead-of-mail"):
        await book_call(user)
    else:
        await send_mail(user, "how is it going?")
    await sleep(MONTH)
    await send_mail(user, "would you recommend us?")


@workflow(name="close_account", version="1")
async def close_at_once(user: str) -> str:
    """Follow the plan of before. It stays until its runs have ended: `stepwell runs list --workflow close_account`."""
    await send_mail(user, "goodbye")
    return "closed"


@workflow(name="close_account", version="2")
async def close_in_a_month(user: str) -> str:
    """Follow the plan of now. Workers that have only this version leave the runs of the other one to others."""
    await send_mail(user, "you have a month to come back")
    await sleep(MONTH)
    await send_mail(user, "goodbye")
    return "closed after a month"
