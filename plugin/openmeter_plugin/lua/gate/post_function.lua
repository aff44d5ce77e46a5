local shared = kong.openmeter_gate
if not shared then
  shared = {}
  -- `kong` is one table for all chunks of this plugin in a worker: what is reported is kept there, not in each chunk.
  pcall(function() kong.openmeter_gate = shared end)
end
local dict = ngx.shared.openmeter_gate
local gate = dict and decide(dict, shared)
local feeder = gate and feed(dict, shared, settings.version, gate)
if not gate then
  ngx.log(ngx.ERR, "openmeter-gate: lets every request pass, because its shared dict is missing: add",
    " `nginx_http_lua_shared_dict = openmeter_gate 10m` to kong.conf and restart Kong")
end
local started

return function()
  if not gate then return end
  if not started then
    started = true -- in this worker, with its first request
    pcall(feeder.start, settings.socket)
  end
  gate.access(settings)
end
