"""The Lua plugin under lupa's LuaJIT, with stand-ins for what it uses of Kong and of nginx.

A request is described by its serialized log, as a real Kong would have made it: `LuaPlugin.log` takes it
apart into the context, variables and functions that kong.log.serialize reads (Kong 3.9, pdk/log.lua). Text
passes as bytes, as in Lua. Files are real.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lupa import luajit21

from openmeter_plugin.config.lua_plugin import FOLDER, lua_files

Value = Any
Edit = tuple[str, Value, str]
"""A call of kong.log.set_serialize_value: key, value, mode."""

_STAND_INS: Final = """
local python = ...
local function loaded(name, module) package.loaded[name] = module end
null = setmetatable({}, { __tostring = function() return "null" end })
local cjson = {
  encode = function(value) return python.encode(value) end,
  decode = function(text) return python.decode(text) end,
}
function cjson.new() return cjson end
loaded("cjson.safe", cjson)
loaded("resty.string", { to_hex = function(digest) return digest end })
loaded("resty.random", { bytes = function() return python.random() end })
loaded("resty.sha256", { new = function()
  local all = ""
  return {
    update = function(_, text) all = all .. text end,
    final = function() return python.sha256(all) end,
  }
end })
loaded("kong.workspaces", { get_workspace_name = function() return request.workspace_name end })
ngx = {
  null = null,
  now = function() return now end,
  crc32_long = function(text) return python.crc32(text) end,
  worker = { pid = function() return 4711 end, id = function() return 0 end },
  req = {
    start_time = function() return now - request.request_time / 1000 end,
    get_method = function() return request.method end,
  },
  resp = { get_headers = function() return request.response_headers end },
}
kong = {
  version = "3.9.1",
  log = { err = function(...)
    local parts = {...}
    for index, part in ipairs(parts) do parts[index] = tostring(part) end
    python.said(table.concat(parts))
  end },
  request = {
    get_method = function() return request.method end,
    get_headers = function() return request.headers end,
    get_query = function() return request.querystring end,
  },
  response = { get_source = function() return request.source end },
}
function serve(handler, conf)
  ngx.ctx, ngx.var, ngx.status = request.ctx, request.var, request.status
  kong.ctx = { shared = request.shared }
  handler:log(conf)
end
-- The tables of headers of a real nginx find `a_b` and `A-B` under `a-b`.
function headers_of(values)
  return setmetatable(values, { __index = function(all, name)
    return rawget(all, name:lower():gsub("_", "-")) end })
end
"""


def number(value: float) -> bytes:
    """Return a number as lua-cjson writes it: with 14 digits."""
    return b"%.14g" % value


@dataclass
class LuaPlugin:
    """The plugin in one worker of nginx, with a folder for its segments."""

    folder: Path
    said: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.runtime = luajit21.LuaRuntime(encoding=None, unpack_returned_tuples=True)
        self.globals = self.runtime.globals()
        python = {
            b"encode": self._encode,
            b"decode": lambda text: self.lua(json.loads(text.decode("latin-1")), "latin-1"),
            b"sha256": lambda text: hashlib.sha256(text).hexdigest().encode(),
            b"random": lambda: os.urandom(8).hex().encode(),
            b"crc32": zlib.crc32,
            b"said": lambda text: self.said.append(text.decode()),
        }
        self.runtime.execute(_STAND_INS.encode(), self.runtime.table_from(python))
        self.null = self.globals[b"null"]
        self.now = 1_800_000_000.0
        sources = {
            f"{FOLDER}/{name}".removesuffix(".lua").replace("/", "."): text
            for name, text in lua_files().items()
        }
        self.globals[b"os"][b"getenv"] = lambda _: str(self.folder).encode()
        preload = self.globals[b"package"][b"preload"]
        for name, text in sources.items():
            preload[name.encode()] = self.runtime.eval(
                b"function(text, name) return loadstring(text, name) end"
            )(text.encode(), b"@" + name.encode())
        self.handler = self.runtime.eval(b"require")(b"kong.plugins.openmeter.handler")

    @property
    def now(self) -> float:
        """The time in the worker."""
        return float(self.globals[b"now"])

    @now.setter
    def now(self, value: float) -> None:
        self.globals[b"now"] = value

    def start(self, *configs: Value) -> None:
        """Start the worker with these configurations."""
        self.call("init_worker")
        self.call("configure", self.runtime.table_from(configs))

    def call(self, phase: str, *arguments: Value) -> None:
        """Call the handler as Kong does."""
        self.handler[phase.encode()](self.handler, *arguments)

    # Values

    def lua(self, value: Value, encoding: str = "utf-8") -> Value:
        """Return a JSON value as Lua has it: text as bytes, numbers as doubles, null as ngx.null."""
        if value is None:
            return self.null
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return value.encode(encoding)
        if isinstance(value, bool):
            return value
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, list):
            return self.runtime.table_from([self.lua(item, encoding) for item in value])
        return self.runtime.table_from(
            {self.lua(name, encoding): self.lua(member, encoding) for name, member in value.items()}
        )

    def _encode(self, value: Value) -> bytes | None:
        kind = luajit21.lua_type(value)
        if value is None or value == self.null:
            return b"null"
        if isinstance(value, bytes):
            return json.dumps(value.decode("latin-1"), ensure_ascii=False).encode("latin-1")
        if isinstance(value, bool):
            return b"true" if value else b"false"
        if isinstance(value, int | float):
            return number(value)
        if kind != "table":
            return None
        keys = list(value)
        if keys and keys == list(range(1, len(keys) + 1)):
            return b"[" + b",".join(self._encode(value[key]) or b"null" for key in keys) + b"]"
        members = (
            (self._encode(key if isinstance(key, bytes) else number(key)) or b"")
            + b":"
            + (self._encode(value[key]) or b"null")
            for key in keys
        )
        return b"{" + b",".join(members) + b"}"

    # A request

    def log(self, conf: Value, log: dict[str, Value], *edits: Edit, **beyond: Value) -> None:
        """Have the plugin log a request that has this log before the edits, and what is beyond the log."""
        request = log["request"]
        response = log["response"]
        latencies = log["latencies"]
        entities = {
            "route": log.get("route"),
            "service": log.get("service"),
            "authenticated_consumer": log.get("consumer"),
            "authenticated_credential": log.get("authenticated_entity"),
        }
        ctx: dict[str, Value] = {name: value for name, value in entities.items() if value is not None}
        ctx |= {"request_id": request["id"]} if "id" in request else {}
        ctx |= {"KONG_PROCESSING_START": log["started_at"]}
        ctx |= {"KONG_WAITING_TIME": latencies["proxy"]}
        ctx |= {"router_matches": {"uri_captures": beyond.get("captures") or {}}}
        ctx |= {name: beyond[name] for name in ("ai_llm_metrics",) if name in beyond}
        ctx |= {"KONG_UNEXPECTED": True} if beyond.get("unexpected") else {}
        if "key_tags" in beyond:
            ctx["authenticated_credential"] = log["authenticated_entity"] | {"tags": beyond["key_tags"]}
        var = {
            "request_length": str(request["size"]),
            "bytes_sent": str(response["size"]),
            "upstream_status": log["upstream_status"],
            "request_completion": beyond.get("completion", "OK"),
        }
        if not isinstance(log["upstream_status"], str):  # of a response that Kong buffered
            ctx["buffered_status"] = var.pop("upstream_status")
        headers = request["headers"]
        if isinstance(anonymous := headers.get("x-anonymous-consumer"), str):
            var["http_x_anonymous_consumer"] = anonymous
        if isinstance(model := response["headers"].get("x-kong-llm-model"), str):
            var["sent_http_x_kong_llm_model"] = model
        source = beyond.get("responder", "service" if log["source"] == "upstream" else "exit")
        described = {
            "ctx": ctx,
            "var": var,
            "status": response["status"],
            "method": request["method"],
            "request_time": latencies["request"],
            "querystring": request["querystring"],
            "started_at": log["started_at"],
            "source": source,
            "shared": beyond.get("shared") or {},
        }
        if log.get("workspace_name") is not None:
            described["workspace_name"] = log["workspace_name"]
        table = self.lua(described)
        headers_of = self.globals[b"headers_of"]
        table[b"headers"] = headers_of(self.lua(headers))
        table[b"response_headers"] = headers_of(self.lua(response["headers"]))
        if edits:
            table[b"ctx"][b"serialize_values"] = self.runtime.table_from([self._edit(edit) for edit in edits])
        self.globals[b"request"] = table
        self.globals[b"serve"](self.handler, conf)

    def _edit(self, edit: Edit) -> Value:
        key, value, mode = edit
        item = self.lua({"key": key, "mode": mode})
        if value is not None:
            item[b"value"] = self.lua(value)
        return item


# What is in the folder


def lines(folder: Path) -> list[bytes]:
    """Return the payloads of all records in the folder's segments, with their checksums checked."""
    found: list[bytes] = []
    for segment in sorted(folder.glob("*.segment")):
        head, *records = segment.read_bytes().splitlines()
        assert json.loads(checked(head))["format"] == "openmeter-kong-segment"
        found += map(checked, records)
    return found


def checked(line: bytes) -> bytes:
    """Return the payload of a line, whose checksum must be right."""
    checksum, payload = line[:8], line[9:]
    assert line[8:9] == b" "
    assert int(checksum, 16) == zlib.crc32(payload)
    return payload


def records(folder: Path) -> list[dict[str, Value]]:
    """Return the records in the folder's segments."""
    return [json.loads(payload.decode("utf-8", "replace")) for payload in lines(folder)]


def lost(folder: Path) -> dict[str, int]:
    """Return the counters of lost records, over all workers."""
    names = ("no_folder", "disk_full", "read_only", "write_failed", "too_large", "internal_error")
    sums = dict.fromkeys(names, 0)
    for file in folder.glob("*.lost"):
        content = file.read_bytes()
        assert len(content) == 4096
        assert content[1024:1040] == b"openmeter-lost-1"
        for index, name in enumerate(names):
            sums[name] += int.from_bytes(content[8 * index : 8 * index + 8], "little")
    return {name: count for name, count in sums.items() if count}
