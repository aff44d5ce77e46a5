-- Feeding: one worker of the node has a long poll at the gate's Unix socket and writes what it sends into the shared
-- dict; every worker reports what it let pass and stopped. Two loops a worker: under Kong a timer a turn costs 80 us.
--
-- Runs in the sandbox of post-function too, as decide.lua, where the keys of the dict are listed.
local ngx = ngx
local pairs, next, tonumber, tostring, pcall, select = pairs, next, tonumber, tostring, pcall, select
local type, concat, floor, min = type, table.concat, math.floor, math.min
local now, sleep = ngx.now, ngx.sleep

local WAIT, TIMEOUT, HOLD = 2, 5, 6 -- seconds of a long poll, of its socket, and of the feeding worker's lock
local REPORT = 0.5 -- seconds between two reports
local AWAY = 1 -- seconds between two attempts to reach the gate; nginx logs each that fails
local SLICE, LINES = 100, 2000 -- lines applied before requests are served in between (0.2 ms); lines of a report
local SPARE = 65536 -- bytes of the dict that no new entry takes: the bookkeeping must not fail
local BODY, HEAD = 8388608, 16384 -- the largest answer, and its largest head

return function(dict, shared, version, gate)
  local complain, count, fields, number, encoded = gate.complain, gate.count, gate.fields, gate.number, gate.encoded
  local feed, room, costs = {}, false, {}

  local function full_dict(consequence)
    count("no_memory")
    complain("the shared dict openmeter_gate is full, " .. consequence .. "; make it larger in kong.conf")
  end

  local function put(key, value, flags)
    if (room or dict:get(key) ~= nil) and dict:safe_set(key, value, 0, flags or 0) then return true end
    full_dict("so that new customers have no entry and count as unseen")
    return false
  end

  local function forget(feature, account)
    local rest = "\t" .. feature .. "\t" .. account
    dict:delete("c" .. rest)
    dict:delete("p" .. rest)
    dict:delete("q" .. rest)
  end

  local function allow(feature, account, left, base, reset, quota)
    local rest = "\t" .. feature .. "\t" .. account
    if quota then put("q" .. rest, quota) else dict:delete("q" .. rest) end
    if not left then return put("c" .. rest, gate.unlimited, reset) end
    local passed = dict:get("p" .. rest)
    if not passed then
      passed = 0
      if not (room and dict:safe_add("p" .. rest, 0)) and not dict:get("p" .. rest) then
        full_dict("so that new customers have no entry and count as unseen")
        return dict:delete("c" .. rest)
      end
    end
    local ceiling = (base or passed) + left
    if not base then -- the gate was restarted and does not know this counter: never raise what there is
      local before = dict:get("c" .. rest)
      if type(before) == "number" then ceiling = min(before, ceiling) end
    end
    return put("c" .. rest, ceiling, reset)
  end

  local function named(key)
    if shared.full then shared.full[key] = true end
    return true
  end

  -- Returns whether the line could be read.
  local function apply_line(f)
    local kind, account, feature = f[1], f[2], f[3]
    if kind == "K" then
      put("k\t" .. account, feature)
      return named("k\t" .. account)
    end
    if kind == "X" then return dict:delete("k\t" .. account) or true end
    if kind == "Y" then
      for known in pairs(costs) do forget(known, account) end
      return true
    end
    local reset = number(f[kind == "A" and 6 or 5])
    if not reset or reset < 0 or reset > 4294967295 or feature == "" then return false end
    if kind == "A" then
      local left, base = number(f[4]), number(f[5])
      if (not left and f[4] ~= "-") or (not base and f[5] ~= "-") then return false end
      allow(feature, account, left, base, floor(reset), number(f[7]))
    else
      if not f[4]:find("^[A-Z_]+$") then return false end
      put("c\t" .. feature .. "\t" .. account, f[4], floor(reset))
    end
    return named("c\t" .. feature .. "\t" .. account)
  end

  local function store_settings(lines)
    local all = concat(lines, "\n")
    costs = gate.parse(all).costs
    if dict:safe_set("settings", all) then
      dict:safe_set("settings_hash", fields(lines[1])[3])
    else
      full_dict("so that new settings of the gate have no effect")
    end
  end

  -- After a full state: what it does not name are subjects and accounts that the gate no longer knows.
  local function sweep()
    for _, key in pairs(dict:get_keys(0)) do
      local feature, account = key:match("^c\t([^\t]*)\t(.*)$")
      if feature and not shared.full[key] then
        forget(feature, account)
      elseif feature and (dict:get("p" .. key:sub(2)) or 0) > 0 then
        gate.changed(feature, account) -- the gate may have been restarted, and needs the counter
      elseif key:find("^k\t") and not shared.full[key] then
        dict:delete(key)
      end
    end
    shared.full = nil
  end

  local function apply_lines(body, pausing)
    local settings, done, spare = nil, 0, min(SPARE, dict:capacity() / 8)
    for line in body:gmatch("[^\n]+") do
      if done % SLICE == 0 then
        if done > 0 and pausing then sleep(0) end
        room = dict:free_space() > spare
      end
      done = done + 1
      if line:find("^C\tbegin\t") then
        settings = { line }
      elseif settings and line:find("^[CLFRW]\t") then
        settings[#settings + 1] = line
      elseif line:find("^[ADKXY]\t") then
        if settings then settings = store_settings(settings) end
        local ok, read = pcall(apply_line, fields(line))
        if not ok or not read then count("feed_errors") end
      end
    end
    if settings then store_settings(settings) end
  end

  -- Applies an answer if it is whole. Returns its head, or nothing and the fault.
  local function apply(body, pausing)
    local epoch, order, kind, more, clock =
      body:match("^openmeter%-gate\t1\t([^\t\n]+)\t(%d+)\t(%a+)\t(%a+)\t([%d.]+)[^\n]*\n")
    local lines = select(2, body:gsub("\n", "")) - 2
    if not epoch or not tonumber(clock) or tonumber(body:match("\nend\t(%d+)[^\n]*\n$")) ~= lines then
      return nil, "the answer is not one of the gate, or not whole"
    end
    if kind == "full" then shared.full = {} end
    apply_lines(body, pausing)
    if more == "done" and shared.full then sweep() end
    return { epoch = epoch, order = tonumber(order), done = more == "done", lines = lines, clock = tonumber(clock) }
  end

  -- HTTP by hand, bounded in size and in time.
  local function receive(socket)
    local got, head_end = "", nil
    repeat
      local part, fault = socket:receiveany(HEAD)
      if not part then return nil, fault, got == "" end
      got = got .. part
      head_end = select(2, got:find("\r\n\r\n", 1, true))
    until head_end or #got > HEAD
    local head = got:sub(1, head_end or 0):lower()
    local status = tonumber(head:match("^http/1%.1 (%d%d%d)"))
    local length = status == 204 and 0 or tonumber(head:match("\r\ncontent%-length: *(%d+)\r\n"))
    if not status or not length or length > BODY then return nil, "the answer is not HTTP of the gate" end
    local body = got:sub(head_end + 1)
    if #body < length then
      local rest, fault = socket:receive(length - #body)
      if not rest then return nil, fault end
      body = body .. rest
    end
    return status, body, head:find("\r\nconnection: close\r\n", 1, true) ~= nil
  end

  local function close(session)
    if session.socket then pcall(session.socket.close, session.socket) end
    session.socket = nil
  end

  -- Returns status and body, or nothing and the fault. The gate may have closed a connection that was idle.
  local function exchange(session, request)
    local reused = session.socket ~= nil
    if not reused then
      local socket = ngx.socket.tcp()
      socket:settimeouts(1000, 2000, TIMEOUT * 1000)
      local ok, fault = socket:connect("unix:" .. session.path)
      if not ok then return nil, fault end
      session.socket = socket
    end
    local sent, fault = session.socket:send(request)
    local status, body, ended
    if sent then status, body, ended = receive(session.socket) else body, ended = fault, true end
    if not status or ended then close(session) end
    if not status and ended and reused and body == "closed" then return exchange(session, request) end
    return status, body
  end

  local function id()
    local known = dict:get("id")
    if known then return known end
    dict:safe_add("id", ("%08x%08x"):format(math.random(0, 0x7fffffff), (now() * 1000) % 0x7fffffff))
    return dict:get("id") or "0000000000000000"
  end

  local function alive(generation)
    return shared.generation == generation and not ngx.worker.exiting()
  end

  -- One worker feeds. The worker that nginx starts in place of a killed one has its id, so it continues at once.
  local function feeds()
    local worker = ngx.worker.id()
    if dict:get("feeder") == nil then dict:safe_add("feeder", worker, HOLD) end
    if dict:get("feeder") ~= worker then return false end
    dict:safe_set("feeder", worker, HOLD)
    return true
  end

  -- Returns the seconds until the next poll, and the fault if there was one.
  local function poll(session, generation)
    if not feeds() then return REPORT end
    local since = (dict:get("since_epoch") or "0") .. "." .. ("%d"):format(dict:get("since_number") or 0)
    local target = ("/v1/feed?kong=%s&since=%s&wait=%d&lua=%s"):format(id(), since, WAIT, version)
    local status, body = exchange(session, "GET " .. target .. " HTTP/1.1\r\nHost: gate\r\n\r\n")
    if status == 503 then return 0.2 end -- the gate is starting
    if status ~= 200 then return AWAY, status and "status " .. status .. ": " .. body:sub(1, 200) or body end
    if not alive(generation) or not feeds() then return REPORT end -- another one feeds now
    local head, fault = apply(body, true)
    if not head then
      close(session)
      return AWAY, fault
    end
    dict:safe_set("since_epoch", head.epoch)
    dict:safe_set("since_number", head.order)
    if head.done then dict:safe_set("at", now()) end
    return head.lines > 0 and 0 or 0.05
  end

  -- Reports

  local function plain(value)
    return (floor(value) == value and "%d" or "%.6f"):format(value)
  end

  local function taken()
    local out = { seen = shared.seen, changed = shared.changed, stops = shared.stops, figures = shared.figures }
    out.uncounted = shared.uncounted
    shared.seen, shared.changed, shared.stops, shared.figures, shared.kept = {}, {}, {}, {}, 0
    shared.uncounted = {}
    return out
  end

  -- What could not be reported is reported next time, with the newest counters.
  local function give_back(out)
    for subject in pairs(out.seen) do
      if gate.kept() then shared.seen[subject] = true end
    end
    for feature, accounts in pairs(out.changed) do
      for account in pairs(accounts) do gate.changed(feature, account) end
    end
    for _, name in pairs({ "stops", "uncounted" }) do
      local counts = shared[name]
      for line, n in pairs(out[name]) do
        if counts[line] or gate.kept() then counts[line] = (counts[line] or 0) + n end
      end
    end
    for name, n in pairs(out.figures) do count(name, n) end
  end

  -- Returns the lines, and for each of them the table and the key that it comes from.
  local function lines_of(out)
    local lines, from, keys = {}, {}, {}
    local function add(line, owner, key)
      lines[#lines + 1], from[#lines + 1], keys[#lines + 1] = line, owner, key
    end
    for subject in pairs(out.seen) do add("S\t" .. encoded(subject), out.seen, subject) end
    for line, n in pairs(out.uncounted) do add(line .. "\t" .. plain(n), out.uncounted, line) end
    for feature, accounts in pairs(out.changed) do
      for account in pairs(accounts) do
        local passed = dict:get("p\t" .. feature .. "\t" .. account)
        if passed then add("P\t" .. encoded(account) .. "\t" .. feature .. "\t" .. plain(passed), accounts, account) end
      end
    end
    for line, n in pairs(out.stops) do add(line .. "\t" .. plain(n), out.stops, line) end
    for name, n in pairs(out.figures) do add("M\t" .. name .. "\t" .. plain(n), out.figures, name) end
    if #lines > 0 then
      local at, none = dict:get("at"), {}
      if at then add("M\tfeed_age_ms\t" .. plain(floor((now() - at) * 1000)), none, 1) end
      add("M\tdict_free\t" .. plain(dict:free_space()), none, 1)
      add("M\tdict_capacity\t" .. plain(dict:capacity()), none, 1)
    end
    return lines, from, keys
  end

  local function send(session, out)
    local lines, from, keys = lines_of(out)
    local target = ("/v1/report?kong=%s&worker=%d"):format(id(), ngx.worker.id())
    for first = 1, #lines, LINES do
      local last = min(first + LINES - 1, #lines)
      local body = concat(lines, "\n", first, last) .. "\nend\t" .. (last - first + 1) .. "\n"
      body = "openmeter-report\t1\n" .. body
      local head = "POST " .. target .. " HTTP/1.1\r\nHost: gate\r\nContent-Type: text/plain\r\nContent-Length: "
      local status, answer = exchange(session, head .. #body .. "\r\n\r\n" .. body)
      if status ~= 204 then return status and "status " .. status .. ": " .. answer:sub(1, 200) or answer end
      for i = first, last do from[i][keys[i]] = nil end
    end
    return nil
  end

  local function report(session)
    -- The gate knows a counter from its beginning only if it hears of a new dict by the feed.
    if not dict:get("since_epoch") then return REPORT end
    if not next(shared.seen) and not next(shared.changed) and not next(shared.stops) and not next(shared.figures)
      and not next(shared.uncounted) then
      return REPORT
    end
    local out = taken()
    local ok, fault = pcall(send, session, out)
    if fault then
      close(session)
      give_back(out)
    end
    return fault and 2 * AWAY or REPORT, ok and fault and "report: " .. fault or fault
  end

  local function loop(turn, generation, path)
    local session = { path = path }
    while alive(generation) do
      local ok, pause, fault = pcall(turn, session, generation)
      if not ok then
        close(session)
        pause, fault = AWAY, pause
      end
      if fault then
        count("feed_errors")
        complain("no news from the gate at " .. path .. " (" .. tostring(fault) .. "); going on with the last state")
      end
      sleep(pause)
    end
    if turn == report then pcall(report, session, generation) end
    close(session)
  end

  -- Starts this worker's loops, and ends those of an earlier start, such as a configuration that was replaced.
  function feed.start(path)
    if not ngx.worker.id() then return false end -- a process of Kong's that serves no requests
    shared.generation = shared.generation + 1
    local generation = shared.generation
    for _, turn in pairs({ poll, report }) do
      local ok, fault = ngx.timer.at(0, function(premature)
        if not premature then loop(turn, generation, path) end
      end)
      if not ok then complain("cannot start: " .. tostring(fault)) end
    end
    return true
  end

  function feed.stop()
    shared.generation = shared.generation + 1
  end

  -- Loads the gate's state file after a restart of Kong, so that the first request finds the last state.
  function feed.load(text)
    if dict:get("at") then return end
    local ok, head, fault = pcall(apply, text, false)
    if ok and head then
      dict:safe_set("at", head.clock)
    else
      complain("the state file cannot be read: " .. tostring(ok and fault or head))
    end
  end

  return feed
end
