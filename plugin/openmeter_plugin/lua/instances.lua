-- Instances: the plugin's configurations in Kong, each with an id, the file that makes it known to the reader, and
-- what its records need to hold.
--
-- The id is a hash of the configuration, so it never means two of them, in any worker, after any crash, reload or
-- upgrade. Not part of it: `__seq__`, which Kong raises at each reload of an unchanged configuration.
local generated = require "kong.plugins.openmeter.generated"
local cjson = require "cjson.safe"
local sha256 = require "resty.sha256"
local to_hex = require("resty.string").to_hex

local ngx, type, ipairs, pairs, setmetatable = ngx, type, ipairs, pairs, setmetatable
local concat, sort = table.concat, table.sort

local M = {}
local VOLATILE = { __seq__ = true, __key__ = true }

-- JSON with sorted keys: the same configuration has the same text in each worker. Unset fields are left out.
local function canonical(value)
  if type(value) ~= "table" then
    return cjson.encode(value)
  end
  local parts = {}
  if value[1] ~= nil then
    for index, item in ipairs(value) do
      parts[index] = canonical(item)
    end
    return "[" .. concat(parts, ",") .. "]"
  end
  local names = {}
  for name, member in pairs(value) do
    if type(name) == "string" and not VOLATILE[name] and member ~= ngx.null then
      names[#names + 1] = name
    end
  end
  sort(names)
  for index, name in ipairs(names) do
    parts[index] = cjson.encode(name) .. ":" .. (canonical(value[name]) or "null")
  end
  return "{" .. concat(parts, ",") .. "}"
end

local function table_of(value)
  return type(value) == "table" and value or {}
end

-- The names that a record must hold, without those that carry credentials: the reader refuses a configuration with
-- such a name, and until it does, no secret may reach a file.
local function add(names, place, name)
  if type(name) == "string" and not generated.secrets[place][name:lower()] then
    names[#names + 1] = place == "query" and name or name:lower()
  end
end

local function wanted(conf)
  local names = { header = {}, query = {}, response_header = {}, path_capture = {} }
  local subject = table_of(conf.subject)
  local lookups = { subject }
  for _, lookup in ipairs(table_of(subject.fallbacks)) do
    lookups[#lookups + 1] = lookup
  end
  for _, lookup in ipairs(lookups) do
    local place = lookup.look_up_value_in
    if place == "header" or place == "query" then
      add(names[place], place, lookup.field)
    end
  end
  for _, attribute in ipairs(table_of(conf.attributes)) do
    local place = attribute.source
    if place == "path_capture" then
      names.path_capture[#names.path_capture + 1] = attribute.look_up_value_in
    elseif names[place] then
      add(names[place], place, attribute.look_up_value_in)
    end
  end
  return names
end

local function compiled(conf)
  local text = canonical(conf)
  local hash = sha256:new()
  hash:update(text)
  local id = to_hex(hash:final()):sub(1, 32)
  local names = wanted(conf)
  return {
    id = id,
    text = text,
    head = '{"i":"' .. id .. '","log":',
    token = conf.api_token,
    endpoint = conf.ingest_endpoint,
    headers = names.header[1] and names.header,
    arguments = names.query[1] and names.query,
    response_headers = names.response_header[1] and names.response_header,
    captures = names.path_capture[1] and names.path_capture,
    application = conf.application_context ~= "never",
  }
end

local known = setmetatable({}, { __mode = "k" })

-- Return the instance of a configuration. Kong puts the new value of a rotated secret into the table that it passed
-- before, so both fields that a vault can hold are compared.
function M.of(conf)
  local instance = known[conf]
  if not instance or instance.token ~= conf.api_token or instance.endpoint ~= conf.ingest_endpoint then
    instance = compiled(conf)
    known[conf] = instance
  end
  return instance
end

return M
