-- The plugin `openmeter` as Lua: in the log phase it appends one line for each request to a Kong segment, a file that
-- `openmeter-plugin serve --segments` reads. It decides nothing: who is billed and what an event looks like is decided
-- where the line is read. No request waits for it and no error of it reaches a request.
--
-- Measured on Kong 3.9.1: kong.log.serialize and cjson cost about 40 us a request, an RPC to a plugin server as much,
-- this plugin 5 to 18 (docs/benchmarks.md). So only what is billed by is read, text that never changes is kept per
-- entity, and a request is written at once: what a worker would keep in memory, a kill -9 would lose.
local generated = require "kong.plugins.openmeter.generated"
local record = require "kong.plugins.openmeter.record"
local instances = require "kong.plugins.openmeter.instances"
local segments = require "kong.plugins.openmeter.segments"
local buffer = require "string.buffer"

local ngx, kong, pcall, ipairs = ngx, kong, pcall, ipairs
local HEAD = segments.HEAD
local MAX_LINE = 64 * 1024

local OpenMeter = { PRIORITY = generated.priority, VERSION = generated.version }

-- kong.conf cannot set a variable of the environment in a worker, except by nginx_main_env. The master has them all,
-- but nginx removes them from its workers: so this is read here, in the master, and again in the worker.
local configured = os.getenv("OPENMETER_PLUGIN_SEGMENTS")
local folder, buf

local function started()
  if not folder then
    folder = segments.new(configured or os.getenv("OPENMETER_PLUGIN_SEGMENTS") or "/run/openmeter/segments")
    buf = buffer.new(4096)
  end
  return folder
end

local function append(ctx, var, conf)
  local instance = instances.of(conf)
  local files = started()
  buf:reset():put(HEAD)
  record.build(buf, instance, ctx, var, files.worker)
  if #buf > MAX_LINE then
    buf:reset():put(HEAD)
    record.build(buf, instance, ctx, var, files.worker, true)
  end
  buf:put("\n")
  files:append(buf, instance, ngx.now())
end

function OpenMeter:init_worker()
  if ngx.worker.id() then -- Kong's other processes log no request
    local ok, fault = pcall(function()
      return started():open_lost()
    end)
    if not ok then
      kong.log.err("Kong segments cannot be started: ", fault)
    end
  end
end

-- Called at the start and after each change, so that the reader knows an instance before its first request.
function OpenMeter:configure(configs)
  for _, conf in ipairs(configs or {}) do
    local ok, fault = pcall(function()
      return started():describe(instances.of(conf), ngx.now())
    end)
    if not ok then
      kong.log.err("an instance of the plugin could not be made known: ", fault)
    end
  end
end

function OpenMeter:log(conf)
  local ok, fault = pcall(append, ngx.ctx, ngx.var, conf)
  if not ok then
    pcall(function()
      started():lose(segments.INTERNAL_ERROR, fault)
    end)
  end
end

return OpenMeter
