"""Events of AI traffic: tokens per call, calls with their cost and units, MCP and A2A requests of agents.

Every event's id is derived from the request's, so a request that is metered twice counts once; ids do not
depend on `ai_tokens`. Payloads, prompts and error messages never become part of an event.

Units are quantities such as credits, computed from the tokens of a call by an expression: arithmetic over its
counts, such as `input + 0.1 * cache_read + 4 * output`. An expression is checked and parsed once, when the
instance starts; simpleeval evaluates it without access to anything else.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from simpleeval import SimpleEval

from openmeter_plugin.metering.ai_usage import (
    GAP_PROPERTY,
    INPUT_TYPES,
    AiCall,
    ai_calls,
    gap_of_call,
    kong_version,
    statistics_off,
)
from openmeter_plugin.metering.lenient_json import count, identifier, json_object, put, text

LLM_REQUEST: Final = "kong.llm_request"
LLM_CACHE_HIT: Final = "kong.llm_cache_hit"
LLM_CALL: Final = "kong.llm_call"
MCP_REQUEST: Final = "kong.mcp_request"
A2A_REQUEST: Final = "kong.a2a_request"

TOKEN_PROPERTIES: Final = frozenset({"tokens", "type", "model", "provider"})
AI_PROPERTIES: Final = TOKEN_PROPERTIES | frozenset(
    {"modality", "operation", GAP_PROPERTY}
    | {"response_model", "request_mode", "cache_status", "cost", "llm_latency_ms", "time_to_first_token_ms"}
    | {"method", "tool", "session", "error", "binding", "task_state", "streaming", "rpc_latency_ms"}
    | {"rpc_response_bytes"}
)
"""The event properties that these events fill; neither attributes nor units replace them there."""

IdentifiedData = tuple[str, str, dict[str, Any]]
"""An event's id, type and data."""


@dataclass(frozen=True, slots=True)
class AiRules:
    """What AI traffic becomes: see the settings of the same names."""

    token_usage: bool = True
    tokens: Literal["kong", "split"] = "kong"
    cache_hits: Literal["bill", "mark", "skip"] = "mark"
    calls: bool = False
    agent_requests: bool = True
    units: tuple[Unit, ...] = ()


DEFAULT_AI_RULES: Final = AiRules()


def ai_events(log: Mapping[str, Any], rules: AiRules, request_id: str) -> Iterator[IdentifiedData]:
    """Yield the events of a log's `ai` part. No JSON value makes it raise."""
    ai = json_object(log.get("ai"))
    if rules.token_usage:
        yield from _model_calls(log, ai, rules, request_id)
    if rules.agent_requests:
        yield from _agent_requests(ai, request_id)


def _model_calls(
    log: Mapping[str, Any], ai: Mapping[str, Any], rules: AiRules, request_id: str
) -> Iterator[IdentifiedData]:
    response, version = json_object(log.get("response")), kong_version(log)
    failed = (count(response.get("status")) or 0) >= 400
    headers = json_object(response.get("headers"))
    for call in ai_calls(ai, version):
        if failed and not call.total:
            continue  # the call was refused, by Kong or by the provider: nothing was used
        if call.is_cache_hit and rules.cache_hits == "skip":
            continue
        kind = LLM_CACHE_HIT if call.is_cache_hit and rules.cache_hits == "mark" else LLM_REQUEST
        model = _model(call)
        put(model, GAP_PROPERTY, None if failed else gap_of_call(call, headers, version))
        for suffix, tokens in _tokens(call, rules.tokens):
            yield f"{request_id}:{call.name}:{suffix}", kind, tokens | model
        if rules.calls or rules.units:
            is_free = kind == LLM_CACHE_HIT
            yield f"{request_id}:{call.name}:call", LLM_CALL, _call(call, model, rules.units, is_free=is_free)


def _tokens(call: AiCall, mode: Literal["kong", "split"]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the end of the event's id and the data for each count.

    The input's event is always sent, if only with 0 tokens: it makes calls countable. Its id is the same in
    both modes, as is the output's.
    """
    if mode == "kong":
        yield "input", {"tokens": call.tokens(*INPUT_TYPES), "type": "input"}
        if output := call.tokens("output", "reasoning"):
            yield "output", {"tokens": output, "type": "output"}
        return
    for kind, modality, tokens in call.parts:
        suffix = kind if modality == "text" else f"{kind}:{modality}"
        yield suffix, {"tokens": tokens, "type": kind, "modality": modality}


def _model(call: AiCall) -> dict[str, Any]:
    data: dict[str, Any] = {"model": call.model, "provider": call.provider}
    put(data, "operation", call.operation)
    return data


def _call(call: AiCall, model: dict[str, Any], units: tuple[Unit, ...], *, is_free: bool) -> dict[str, Any]:
    """Return the data of a call as a whole: what exists once per call and must be summed once.

    A call that no provider answered, `is_free`, costs nothing and has no tokens for its units.
    """
    data = {"tokens": call.total} | model
    cost = 0 if is_free else call.cost or 0
    for name, value in (
        ("response_model", call.response_model),
        ("request_mode", call.request_mode),
        ("cache_status", call.cache_status),
        # 0 is "Kong had no price": OpenMeter rejects an event that lacks what a meter sums.
        ("cost", cost),
        ("llm_latency_ms", call.latency_ms),
        ("time_to_first_token_ms", call.time_to_first_token_ms),
    ):
        put(data, name, value)
    if units:
        counts: dict[str, float] = dict.fromkeys(UNIT_NAMES, 0)
        for part in () if is_free else call.parts:
            counts[part.type] += part.tokens
        counts["cost"] = cost
        for unit in units:
            put(data, unit.name, unit.quantity(counts))
    return data


def reports_no_usage(log: Mapping[str, Any], rules: AiRules) -> bool:
    """Return whether a log shows a call to a model whose tokens an AI plugin did not log."""
    if not rules.token_usage:
        return False
    ai = json_object(log.get("ai"))
    return statistics_off(json_object(log.get("response")), ai, ai_calls(ai))


def _agent_requests(ai: Mapping[str, Any], request_id: str) -> Iterator[IdentifiedData]:
    """Yield an event for each JSON-RPC request that ai-mcp-proxy or ai-a2a-proxy logged."""
    mcp, a2a = json_object(ai.get("mcp")), json_object(ai.get("a2a"))
    for index, rpc in enumerate(_requests(mcp)):
        data = _rpc(rpc, session=mcp.get("mcp_session_id"))
        put(data, "tool", text(rpc.get("tool_name")))
        yield f"{request_id}:mcp:{index}", MCP_REQUEST, data
    for index, rpc in enumerate(_requests(a2a)):
        data = _rpc(rpc, session=rpc.get("context_id"))
        for name in ("binding", "task_state"):
            put(data, name, text(rpc.get(name)))
        if type(rpc.get("streaming")) is bool:
            data["streaming"] = rpc["streaming"]
        yield f"{request_id}:a2a:{index}", A2A_REQUEST, data


def _requests(block: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the entries of `rpc`. Lua's encoder writes an empty list as an object."""
    entries = block.get("rpc")
    for entry in entries if type(entries) is list else ():
        yield json_object(entry)


def _rpc(rpc: Mapping[str, Any], *, session: object) -> dict[str, Any]:
    """Return what both protocols have; an error becomes true, since its message may quote the payload."""
    data: dict[str, Any] = {"error": bool(rpc.get("error"))}
    for name, value in (
        ("method", text(rpc.get("method"))),
        ("session", identifier(session)),
        ("rpc_latency_ms", count(rpc.get("latency"))),
        ("rpc_response_bytes", count(rpc.get("response_body_size"))),
    ):
        put(data, name, value)
    return data


# Units

UNIT_NAMES: Final = ("input", "cache_read", "cache_write", "output", "reasoning", "cost")
"""What an expression can use: the call's tokens by type, and its cost as Kong logged it (0 if it did not)."""

_OPERATORS: Final[Mapping[type[ast.AST], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.USub: lambda a: -a,
    ast.UAdd: lambda a: a,
}
_FUNCTIONS: Final[Mapping[str, Any]] = {"min": min, "max": max, "ceil": math.ceil, "floor": math.floor}

_DIGITS: Final = 9
"""Decimal places of a result: 0.1 * 3 is 0.3 in an event, not 0.30000000000000004."""

_MAX_LENGTH: Final = 500


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit's name, which is its event property, and its parsed expression."""

    name: str
    expression: str
    _parsed: ast.AST = field(repr=False, compare=False)

    def quantity(self, counts: Mapping[str, float]) -> float | None:
        """Return the quantity for the counts of a call, or None where it has none (a division by 0)."""
        evaluator = SimpleEval(operators=dict(_OPERATORS), functions=dict(_FUNCTIONS), names=dict(counts))
        try:
            value = float(evaluator.eval(self.expression, previously_parsed=self._parsed))
        except (ArithmeticError, ValueError, TypeError):
            return None
        if not math.isfinite(value):
            return None
        rounded = round(value, _DIGITS)
        return int(rounded) if rounded.is_integer() else rounded


def compile_unit(name: str, expression: str) -> Unit:
    """Return the unit; raises ValueError that names the column of what is wrong with the expression."""
    if len(expression) > _MAX_LENGTH:
        raise ValueError(f"an expression has at most {_MAX_LENGTH} characters, this one {len(expression)}")
    text = expression.strip()
    try:
        parsed = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"column {error.offset or 1}: this is no arithmetic expression") from None
    except (RecursionError, MemoryError, ValueError):
        raise ValueError("column 1: this is no arithmetic expression") from None
    for node in ast.walk(parsed):
        _check(node)
    return Unit(name, text, parsed)


def _check(node: ast.AST) -> None:
    """Raise ValueError for anything that is not arithmetic over the known names."""
    where = f"column {getattr(node, 'col_offset', 0) + 1}"
    match node:
        case ast.Name(id=name) if name not in UNIT_NAMES and name not in _FUNCTIONS:
            raise ValueError(f"{where}: {name!r} is unknown, an expression can use {', '.join(UNIT_NAMES)}")
        case ast.Constant(value=value) if type(value) not in (int, float):
            raise ValueError(f"{where}: {value!r} is no number")
        case ast.Call(func=ast.Name(id=name), keywords=[]) if name in _FUNCTIONS:
            pass
        case ast.Call():
            raise ValueError(f"{where}: the functions are {', '.join(_FUNCTIONS)}")
        case ast.BinOp(left=left, op=op) if type(op) not in _OPERATORS:
            raise ValueError(f"after column {left.end_col_offset}: the operators are + - * / and parentheses")
        case ast.UnaryOp(op=op) if type(op) not in _OPERATORS:
            raise ValueError(f"{where}: the operators are + - * / and parentheses")
        case ast.BinOp() | ast.UnaryOp() | ast.Name() | ast.Constant() | ast.Load():
            pass
        case ast.operator() | ast.unaryop():
            pass  # checked with its operands, which have a column
        case _:
            raise ValueError(f"{where}: only arithmetic is possible here")
