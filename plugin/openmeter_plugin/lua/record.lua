-- The record of one request: what kong.log.serialize would say of it, under the same names, as far as it is billed by.
--
-- Each value is read where kong.log.serialize reads it (compared for the same requests on Kong 3.9.1, each equal).
-- Never read: the URI, headers, arguments and captures that no configuration names, client addresses, payloads.
local cjson = require("cjson.safe").new()
local ngx, kong, type, pairs, ipairs = ngx, kong, type, pairs, ipairs
local setmetatable, rawget, next = setmetatable, rawget, next
local sub, find, gmatch, floor = string.sub, string.find, string.gmatch, math.floor
local encode = cjson.encode
local workspace_name = require("kong.workspaces").get_workspace_name

local M = {}
local WEAK = { __mode = "k" }
local MAX_TEXT = 4100 -- bytes: the reader keeps 1024 characters, of at most four bytes each
local MAX_VALUES = 2000
-- What is read of the response to a call of a model: Kong's version decides what the tokens of some providers include.
local AI_HEADERS = { "via", "server", "content-type", "x-kong-llm-model" }
local counter = 0 -- of requests without an id

-- No loop, closure or pattern in what runs for each request: LuaJIT compiles them badly or not at all.

-- An id of Kong, 32 hexadecimal digits, or any other text.
local function id_text(id)
  return #id == 32 and id or sub(encode(id), 2, -2)
end

-- nginx answers itself to a method of other characters than A-Z, - and _. For such a page Kong takes the method from
-- the request line, where ngx.req.get_method() is not what the client sent.
local function method_text(ctx)
  if ctx.KONG_UNEXPECTED then
    return encode((kong.request.get_method())) or "null"
  end
  return '"' .. ngx.req.get_method() .. '"'
end

-- Entities are the same tables for as long as Kong's caches hold them, so their text is made once.
local function cached(texts, entity, make)
  local text = texts[entity]
  if not text then
    text = make(entity)
    texts[entity] = text
  end
  return text
end

local function named(entity)
  return encode { id = entity.id, name = entity.name } or "{}"
end

local function consumer_text(consumer)
  return encode {
    id = consumer.id,
    username = consumer.username,
    custom_id = consumer.custom_id,
    tags = consumer.tags,
  } or "{}"
end

local function credential_text(credential)
  return encode { id = credential.id, consumer_id = credential.consumer_id } or "{}"
end

local function tags_text(credential)
  return type(credential.tags) == "table" and credential.tags[1] ~= nil and encode(credential.tags) or ""
end

local routes, services = setmetatable({}, WEAK), setmetatable({}, WEAK)
local consumers, credentials = setmetatable({}, WEAK), setmetatable({}, WEAK)
local key_tags, workspaces = setmetatable({}, WEAK), {}

-- Pick members by their exact names; rawget, because the tables of headers find `a_b` under `a-b`.
local function pick(values, names)
  local picked = {}
  for _, name in ipairs(names) do
    picked[name] = rawget(values, name)
  end
  return picked
end

-- Set by plugins with kong.log.set_serialize_value

local READ = {
  ai = {},
  started_at = {},
  source = {},
  upstream_status = {},
  workspace_name = {},
  openmeter_gate = {},
  request = { "id", "method", "size", "headers", "querystring" },
  response = { "status", "size", "headers" },
  latencies = { "request", "proxy" },
  route = { "id", "name" },
  service = { "id", "name" },
  consumer = { "id", "username", "custom_id", "tags" },
  authenticated_entity = { "id", "consumer_id" },
}

local function root_of(item)
  local key = item.key
  local dot = find(key, ".", 2, true)
  return dot and sub(key, 1, dot - 1) or key
end

-- Return whether any of these values is read from the log, and whether one is about AI. Plugins such as
-- correlation-id set others at each request.
local function relevant(values)
  local any, ai = false, false
  for _, item in ipairs(values) do
    local root = root_of(item)
    any = any or READ[root] ~= nil
    ai = ai or root == "ai"
  end
  return any, ai
end

-- Copy a value that a plugin set, bounded. Of payloads and errors that AI plugins log remains whether there were any:
-- an error's text may quote the payload.
local function copy(name, value, left, depth)
  left.values = left.values - 1
  local kind = type(value)
  if left.values < 0 or depth > 20 then
    left.cut = true
    return nil
  elseif left.ai and name == "payload" and value ~= nil then
    return true
  elseif left.ai and name == "error" and (kind == "string" or kind == "table") then
    return value ~= "" and (kind == "string" or next(value) ~= nil)
  elseif kind == "string" then
    return #value > MAX_TEXT and sub(value, 1, MAX_TEXT) or value
  elseif kind == "number" or kind == "boolean" or value == ngx.null then
    return value
  elseif kind ~= "table" then
    return nil
  end
  local copied = {}
  for key, member in pairs(value) do
    copied[key] = copy(key, member, left, depth + 1)
  end
  return copied
end

-- As edit_result in Kong's pdk/log.lua; there an edit that cannot be made fails the log, here it is left out.
local function edit(root, item, left)
  local node, from, mode = root, 1, item.mode
  for dot in gmatch(sub(item.key, 2), "()%.") do
    local name = sub(item.key, from, dot)
    from = dot + 2
    if left.ai and name == "payload" then
      node[name] = mode ~= "replace" or node[name]
      return
    elseif node[name] == nil then
      if mode == "replace" then
        return
      end
      node[name] = {}
    elseif type(node[name]) ~= "table" then
      return
    end
    node = node[name]
  end
  local name = sub(item.key, from)
  local exists = node[name] ~= nil
  if mode == "set" or (mode == "add" and not exists) or (mode == "replace" and exists) then
    node[name] = copy(name, item.value, left, 0)
  end
end

-- Return the log's text with the values that plugins set; nil if it cannot be encoded.
local function edited(text, values, instance, left)
  local root = cjson.decode(text)
  for _, item in ipairs(values) do
    local name = root_of(item)
    left.ai = name == "ai"
    if READ[name] and not (left.ai and left.short) then
      edit(root, item, left)
    end
  end
  for name, members in pairs(READ) do
    local value = root[name]
    if type(value) == "table" and members[1] then
      root[name] = pick(value, members)
      if name == "authenticated_entity" and next(value) ~= nil and next(root[name]) == nil then
        root[name].id = true -- only whether there is one is read
      end
    end
  end
  local request, response = root.request, root.response
  if type(request) == "table" then
    if type(request.headers) == "table" then
      local kept = pick(request.headers, instance.headers or {})
      kept["x-anonymous-consumer"] = request.headers["x-anonymous-consumer"]
      request.headers = kept
    end
    if type(request.querystring) == "table" then
      request.querystring = pick(request.querystring, instance.arguments or {})
    end
  end
  if type(response) == "table" and type(response.headers) == "table" then
    local kept = pick(response.headers, AI_HEADERS)
    for name, value in pairs(pick(response.headers, instance.response_headers or {})) do
      kept[name] = value
    end
    response.headers = kept
  end
  return encode(root)
end

-- Put the members of the log, in the order of kong.log.serialize.
local function put_log(buf, instance, ctx, var, edits, ai, worker)
  local id = ctx.request_id or var.kong_request_id
  if not id then -- before Kong 3.5; read twice, the line must be the same request
    counter = counter + 1
    id = worker .. "-" .. counter
  end
  local consumer, credential = ctx.authenticated_consumer, ctx.authenticated_credential
  buf:put('{"request":{"id":"', id_text(id), '","method":', method_text(ctx), ',"size":', var.request_length or "null")
  local headers = instance.headers and pick(kong.request.get_headers(), instance.headers)
  if edits or (consumer and not credential) then -- an anonymous consumer, if Kong has set this header
    headers = headers or {}
    headers["x-anonymous-consumer"] = var.http_x_anonymous_consumer
  end
  if headers then
    buf:put(',"headers":', encode(headers) or "{}")
  end
  if instance.arguments then
    local arguments = pick(kong.request.get_query() or {}, instance.arguments)
    buf:put(',"querystring":', encode(arguments) or "{}")
  end
  buf:put('},"response":{"status":', ngx.status, ',"size":', var.bytes_sent or "null")
  if instance.response_headers or ai or var.sent_http_x_kong_llm_model then
    local all = ngx.resp.get_headers()
    headers = pick(all, AI_HEADERS)
    for _, name in ipairs(instance.response_headers or {}) do
      headers[name] = rawget(all, name)
    end
    buf:put(',"headers":', encode(headers) or "{}")
  end
  local source = kong.response.get_source(ctx)
  local upstream_status = var.upstream_status -- digits, ", " and " : "
  local started = ngx.req.start_time() -- with ngx.now(), the same as $request_time, which is text
  buf:put('},"latencies":{"request":', floor((ngx.now() - started) * 1000 + 0.5), ',"proxy":', ctx.KONG_WAITING_TIME or -1,
    '},"started_at":', ctx.KONG_PROCESSING_START or started * 1000,
    ',"upstream_status":', upstream_status and '"' .. upstream_status .. '"' or ctx.buffered_status or '""',
    source == "service" and ',"source":"upstream"' or ',"source":"kong"')
  if ctx.route then
    buf:put(',"route":', cached(routes, ctx.route, named))
  end
  if ctx.service then
    buf:put(',"service":', cached(services, ctx.service, named))
  end
  if consumer then
    buf:put(',"consumer":', cached(consumers, consumer, consumer_text))
  end
  if credential then
    buf:put(',"authenticated_entity":', cached(credentials, credential, credential_text))
  end
  local workspace = workspace_name and workspace_name()
  if workspace then
    buf:put(',"workspace_name":', cached(workspaces, workspace, encode))
  end
  buf:put("}")
  return source, credential
end

local APPLICATION = { "application_id", "developer_id", "portal_id", "organization_id" }

-- Put what the serialized log does not have: what the plugin server asks Kong for by PDK calls, and more.
local function put_extra(buf, instance, ctx, var, source, credential, left)
  local separator = ',"x":{'
  if var.request_completion ~= "OK" then -- the client did not get the whole response
    buf:put(separator, '"completion":""')
    separator = ","
  end
  if source ~= "service" then
    buf:put(separator, '"responder":"', source, '"')
    separator = ","
  end
  if credential then
    local tags = cached(key_tags, credential, tags_text)
    if tags ~= "" then
      buf:put(separator, '"key_tags":', tags)
      separator = ","
    end
  end
  local matches = instance.captures and ctx.router_matches
  if matches and matches.uri_captures then
    local captures = encode(pick(matches.uri_captures, instance.captures))
    if captures and captures ~= "{}" then
      buf:put(separator, '"captures":', captures)
      separator = ","
    end
  end
  local context = instance.application and kong.ctx.shared.kaa_application_context
  if type(context) == "table" then
    buf:put(separator, '"shared":{"kaa_application_context":', encode(copy("", pick(context, APPLICATION), left, 0)) or "{}", "}")
    separator = ","
  end
  if ctx.ai_llm_metrics and not left.short then
    left.ai = true
    local metrics = encode(copy("", ctx.ai_llm_metrics, left, 0))
    if metrics then
      buf:put(separator, '"ai_metrics":', metrics)
      separator = ","
    end
  end
  if separator == "," then
    buf:put("}")
  end
end

local left = {} -- what copies may still hold; one table, because each request would make garbage of its own

-- Put the record's JSON. With `short`, without anything about AI: the only part that can be large.
function M.build(buf, instance, ctx, var, worker, short)
  local values = ctx.serialize_values
  local any, ai = false, false
  if values then
    any, ai = relevant(values)
  end
  left.values, left.short, left.cut, left.ai = MAX_VALUES, short, short, false
  buf:put(instance.head)
  local head = #buf
  local source, credential = put_log(buf, instance, ctx, var, any, ai, worker)
  if any then
    local text = buf:tostring()
    local plain = sub(text, head + 1)
    local changed = edited(plain, values, instance, left)
    left.cut = left.cut or not changed
    buf:reset():put(sub(text, 1, head), changed or plain)
  end
  put_extra(buf, instance, ctx, var, source, credential, left)
  buf:put(left.cut and ',"cut":true}' or "}")
end

return M
