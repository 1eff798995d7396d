"""Steps for special machines: what needs a GPU is executed by workers that have one, the rest anywhere.

    stepwell worker examples/queues.py
    stepwell worker examples/queues.py --queue gpu --concurrency 1
    stepwell enqueue publish_video '{"title": "Oslo"}' --wait

The second worker belongs on the machine with the GPU; with `--concurrency 1` it does one thing at a time. While there is
none, `stepwell runs show RUN` says which queue the run waits for.
"""

from tenacity import stop_after_attempt

from worker import call, gather, retrying, step, workflow


@step
async def fetch(title: str) -> str:
    """Stands for a download; returns where the file is, not the file: results are stored in Postgres."""
    return f"store/{title}.mov"


@step(queue="gpu", timeout=3600, retry=retrying(stop=stop_after_attempt(3)))
def encode(source: str, height: int) -> str:
    """Stands for an encoder. `on_crash` is "retry": a worker that dies has the file encoded once more."""
    return source.replace(".mov", f"-{height}p.mp4")


@step
async def publish(files: list[str]) -> str:
    return f"published {', '.join(files)}"


@workflow
async def publish_video(title: str) -> str:
    source = await fetch(title)
    files = await gather(*(call(encode, source, height) for height in (480, 1080)))
    return await publish(list(files))
