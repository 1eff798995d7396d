"""A chat with an agent: what the person says comes as signals, the model calls tools, what is said is a stream.

    stepwell worker examples/agent.py
    stepwell enqueue chat
    stepwell signal RUN message '"Is it warmer in Oslo or in Rome?"'
    stepwell runs stream RUN --follow
    stepwell signal RUN message '"stop"'

RUN is the id that `enqueue` has printed. Each answer of the model and of a tool is recorded, so it is paid for once:
a crash in the middle of a turn repeats only the call that was interrupted.
"""

from dataclasses import dataclass

from tenacity import stop_after_attempt

from worker import continue_as, emit, gather, retrying, set_state, step, wait_signal, workflow

TURNS = 20
"""After so many turns the history begins anew, with the conversation as its input."""
TEMPERATURES = {"Oslo": 12, "Rome": 24, "Lima": 19}


@dataclass(frozen=True)
class ToolCall:
    tool: str
    argument: str


@dataclass(frozen=True)
class Message:
    role: str
    text: str
    calls: tuple[ToolCall, ...] = ()


@step(retry=retrying(stop=stop_after_attempt(5), on=ConnectionError), timeout=120)
async def think(conversation: list[Message]) -> Message:
    """Stands for the API of a model: it looks up the weather of the cities that it is asked about."""
    last = conversation[-1]
    if last.role == "tool":
        found = [each.text for each in conversation if each.role == "tool"]
        return Message("assistant", f"I have found: {', '.join(found[-2:])}.")
    cities = [word for word in last.text.replace("?", " ").split() if word in TEMPERATURES]
    calls = tuple(ToolCall("weather", city) for city in cities)
    return Message("assistant", "" if calls else f"You say: {last.text}", calls)


@step(retry=retrying(stop=stop_after_attempt(3)))
async def use_tool(call: ToolCall) -> Message:
    """Stands for your tools."""
    return Message("tool", f"{call.argument} {TEMPERATURES[call.argument]}°")


async def answer(conversation: list[Message]) -> None:
    """Let the model call tools, several at once, until it has an answer."""
    while (reply := await think(conversation)).calls:
        conversation.append(reply)
        results = await gather(*(use_tool(call) for call in reply.calls))
        for result in results:
            emit("tools", result.text)
        conversation.extend(results)
    conversation.append(reply)
    emit("answers", reply.text)


async def heard() -> str | None:
    """Return what the person says next; None when it is "stop", or when nobody has said anything for an hour."""
    try:
        text = await wait_signal("message", type=str, timeout=3600)
    except TimeoutError:
        return None
    return None if text == "stop" else text


@workflow
async def chat(conversation: tuple[Message, ...] = ()) -> int:
    """Talk until the person has had enough, and return the number of messages."""
    said = list(conversation)
    for _ in range(TURNS):
        set_state("messages", len(said))
        if (text := await heard()) is None:
            break
        said.append(Message("user", text))
        await answer(said)
    else:
        continue_as(tuple(said))
    return len(said)
