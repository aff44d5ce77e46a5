-- What the gate uses of nginx and Kong, in virtual time: a shared dict, light threads, sockets, and a worker's globals.
local python = ...
clock = { now = 1800000000 }

function new_dict(most) -- `most` entries fit; as ngx.shared, safe_* never evicts
  local data, used, dict = {}, 0, {}
  local function live(key)
    local entry = data[key]
    if entry and entry.expires and entry.expires <= clock.now then
      data[key], used, entry = nil, used - 1, nil
    end
    return entry
  end
  local function store(key, value, seconds, flags)
    if not live(key) then
      if used >= most then return false, "no memory" end
      used = used + 1
    end
    data[key] = { value = value, flags = flags, expires = seconds and seconds > 0 and clock.now + seconds or nil }
    return true
  end
  function dict:get(key)
    local entry = live(key)
    if not entry then return nil end
    return entry.value, entry.flags ~= 0 and entry.flags or nil
  end
  function dict:safe_set(key, value, seconds, flags) return store(key, value, seconds, flags) end
  function dict:safe_add(key, value, seconds, flags)
    if live(key) then return false, "exists" end
    return store(key, value, seconds, flags)
  end
  function dict:incr(key, by)
    local entry = live(key)
    if not entry then return nil, "not found" end
    if type(entry.value) ~= "number" then return nil, "not a number" end
    entry.value = entry.value + by
    return entry.value
  end
  function dict:delete(key)
    if live(key) then data[key], used = nil, used - 1 end
  end
  function dict:get_keys()
    local keys = {}
    for key in pairs(data) do if live(key) then keys[#keys + 1] = key end end
    return keys
  end
  function dict:capacity() return most * 128 end
  function dict:free_space() return (most - used) * 128 end
  return dict
end

local function new_socket()
  local socket, link, timeout = {}, nil, 60
  function socket:settimeouts(_, _, milliseconds) timeout = milliseconds / 1000 end
  function socket:connect(address)
    link = python.connect(address)
    if link == nil then return nil, "connection refused" end
    return 1
  end
  function socket:send(data)
    if python.send(link, data) then return #data end
    return nil, "closed"
  end
  local function receive(size, exact)
    local waited = 0
    while true do
      local data = python.receive(link, size, exact)
      if data == false then return nil, "closed" end
      if data ~= nil then return data end
      if waited >= timeout then return nil, "timeout" end
      coroutine.yield(0.05)
      waited = waited + 0.05
    end
  end
  function socket:receiveany(size) return receive(size, false) end
  function socket:receive(size) return receive(size, true) end
  function socket:close() python.close(link) return 1 end
  return socket
end

-- A worker: its globals `ngx` and `kong`, and its light threads.
function new_worker(id, dict)
  local worker = { threads = {}, exiting = false, said = {} }
  local ngx = {
    ERR = 4, ctx = {}, var = {}, header = {}, shared = { openmeter_gate = dict },
    now = function() return clock.now end,
    sleep = function(seconds) coroutine.yield(seconds) end,
    log = function(_, ...) worker.said[#worker.said + 1] = table.concat({ ... }) end,
    worker = { id = function() return id end, exiting = function() return worker.exiting end },
    socket = { tcp = new_socket },
    timer = { at = function(_, call)
      worker.threads[#worker.threads + 1] = { thread = coroutine.create(call), due = clock.now, first = true }
      return true
    end },
  }
  local kong = { ctx = { shared = {} } }
  kong.log = {
    err = function(...) worker.said[#worker.said + 1] = table.concat({ ... }) end,
    set_serialize_value = function(key, value) worker.marks[key] = value end,
  }
  kong.request = {
    get_header = function(name) return worker.request.headers[name] end,
    get_query_arg = function(name) return worker.request.query[name] end,
  }
  kong.response = { exit = function(status, body, headers)
    if worker.exit_fails then error("cannot exit") end
    worker.answer = { status = status, body = body, headers = headers }
    coroutine.yield("exit") -- does not return, as in Kong
  end }
  worker.ngx, worker.kong = ngx, kong

  function worker.serve(request, access)
    worker.request, worker.answer, worker.marks = request, nil, {}
    ngx.ctx, ngx.var, ngx.header, kong.ctx.shared = request.ctx, request.var, {}, request.shared
    local thread = coroutine.create(access)
    local ok, fault = coroutine.resume(thread)
    if not ok then error(fault, 0) end
    return worker.answer, ngx.header, worker.marks
  end

  -- Runs what is due until each thread waits. Returns the time of the next that is due.
  function worker.turn()
    local next_due
    for i = #worker.threads, 1, -1 do
      local one = worker.threads[i]
      while one.due <= clock.now and coroutine.status(one.thread) ~= "dead" do
        local ok, seconds = coroutine.resume(one.thread, false)
        if not ok then error(seconds, 0) end
        if coroutine.status(one.thread) ~= "dead" then one.due = clock.now + math.max(seconds, 1e-6) end
        if coroutine.status(one.thread) ~= "dead" and seconds == 0 then one.due = clock.now end
      end
      if coroutine.status(one.thread) == "dead" then
        table.remove(worker.threads, i)
      elseif not next_due or one.due < next_due then
        next_due = one.due
      end
    end
    return next_due
  end
  return worker
end

-- What the sandbox of post-function has, besides `kong` and `ngx` (kong/tools/kong-lua-sandbox.lua of Kong 3.9).
local names = [[_VERSION assert error ipairs next pairs pcall select tonumber tostring type unpack xpcall
  coroutine.create coroutine.resume coroutine.running coroutine.status coroutine.wrap coroutine.yield
  math.abs math.acos math.asin math.atan math.atan2 math.ceil math.cos math.cosh math.deg math.exp math.fmod
  math.floor math.frexp math.huge math.ldexp math.log math.log10 math.max math.min math.modf math.pi math.pow
  math.rad math.random math.sin math.sinh math.sqrt math.tan math.tanh os.clock os.date os.difftime os.time
  string.byte string.char string.find string.format string.gmatch string.gsub string.len string.lower
  string.match string.rep string.reverse string.sub string.upper
  table.concat table.insert table.maxn table.remove table.sort]]

function sandbox(worker)
  local env = { kong = worker.kong, ngx = worker.ngx }
  for name in names:gmatch("%S+") do
    local module, member = name:match("([^.]+)%.([^.]+)")
    if module then
      env[module] = env[module] or {}
      env[module][member] = _G[module][member]
    else
      env[name] = _G[name]
    end
  end
  return env
end

-- The environment of a plugin's files: all of Lua, and `require` among them.
function plugin_environment(worker, sources)
  local loaded = {}
  local env = setmetatable({ kong = worker.kong, ngx = worker.ngx }, { __index = _G })
  function env.require(name)
    if loaded[name] == nil then
      loaded[name] = setfenv(assert(loadstring(assert(sources[name], name), "@" .. name)), env)()
    end
    return loaded[name]
  end
  return env
end

function compiled(text, env) return setfenv(assert(loadstring(text, "@post-function")), env) end
function turn(worker) return worker.turn() end
