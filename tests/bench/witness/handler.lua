-- Notes the id of each request when its response begins, and removes it in the log phase, after our plugin. What is
-- left of a killed worker had not come through its log phase. GET /witness lists it.
local Witness = { PRIORITY = 1, VERSION = "1" }

local function id()
  return ngx.ctx.request_id or ngx.var.kong_request_id
end

function Witness:access()
  if ngx.var.uri == "/witness" then
    kong.response.exit(200, table.concat(ngx.shared.witness:get_keys(0), "\n"))
  end
end

function Witness:header_filter()
  ngx.shared.witness:safe_set(id(), 1)
end

function Witness:log()
  ngx.shared.witness:delete(id())
end

return Witness
