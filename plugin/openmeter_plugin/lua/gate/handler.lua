-- The plugin `openmeter-gate`: stops who has used up what they paid for; decide.lua decides, feed.lua feeds it.
local generated = require "kong.plugins.openmeter-gate.generated"
local decide = require "kong.plugins.openmeter-gate.decide"
local feed = require "kong.plugins.openmeter-gate.feed"

local ngx, kong, pcall = ngx, kong, pcall

-- After authentication (1250 and less) and acl (950), before rate-limiting (910) and ai-proxy (770).
local Gate = { PRIORITY = generated.priority, VERSION = generated.version }

local MISSING = "openmeter-gate: lets every request pass, because its shared dict is missing: add"
  .. " `nginx_http_lua_shared_dict = openmeter_gate 10m` to kong.conf and restart Kong"

local gate, feeder, path
local dict = ngx.shared.openmeter_gate
if dict then
  local shared = {}
  gate = decide(dict, shared)
  feeder = feed(dict, shared, generated.version, gate)
end

local function load_state(socket)
  local file = io.open(socket .. ".state", "rb")
  if not file then return end
  local text = file:read("*a")
  file:close()
  feeder.load(text)
end

local function start(socket)
  if path == socket then return end
  path = socket
  local ok, fault = pcall(load_state, socket)
  if not ok then kong.log.err("the gate's state file cannot be read: ", fault) end
  ok, fault = pcall(feeder.start, socket)
  if not ok then
    path = nil
    kong.log.err("the gate's feed cannot be started: ", fault)
  end
end

-- Called in each worker at its start, before requests are served, and after each change of Kong's configuration.
function Gate:configure(configs)
  if not gate then
    if configs then kong.log.err(MISSING) end
  elseif configs and configs[1] then
    for i = 2, #configs do
      if configs[i].socket ~= configs[1].socket then
        kong.log.err("config.socket differs between instances: all use ", configs[1].socket)
      end
    end
    start(configs[1].socket)
  elseif path then
    path = nil
    feeder.stop()
  end
end

function Gate:access(conf)
  if gate then
    if not path then start(conf.socket) end
    gate.access(conf)
  end
end

return Gate
