-- The gate decides here, in the access phase, from a shared dict that feed.lua keeps up to date. It calls and waits for
-- nothing, and no fault of it reaches a request.
--
-- The same text runs as a module of the plugin `openmeter-gate` and in the sandbox of post-function: so neither file
-- has require, io, cjson or setmetatable. docs/gate.md says what is exchanged with the gate.
-- Keys of the dict (a feature has no TAB, so they are unambiguous):
--   k <subject>            the account that pays; subjects of one customer share it
--   c <feature> <account>  ceiling (a number) or the reason of a denial (text); flags: unix seconds of the reset, or 0
--   p <feature> <account>  what passed so far; a request passes if this was below the ceiling
--   q <feature> <account>  the whole allowance, for headers
--   settings, settings_hash, at (time of the newest answer), since_epoch, since_number, feeder (the feeding worker), id
-- Only safe_set, safe_add, and incr of what is there: nothing evicts, because without its counter a subject would pass.
local ngx, kong = ngx, kong
local type, tonumber, tostring, pcall = type, tonumber, tostring, pcall
local floor, max, min = math.floor, math.max, math.min
local now = ngx.now

local UNLIMITED = 1e300 -- a ceiling that is not counted up to
local DIGITS_14 = 99999999999999 -- the largest figure in a header
local LOOK = 0.1 -- seconds between two looks for news; between them a worker remembers what it read from the dict
local SEEN = 10 -- seconds between two reports of the same active subject
local MOST = 10000 -- keys kept for the next report, and plans
local MODES = { off = 0, shadow = 1, enforce = 2 }
local STATUS = { USAGE_LIMIT_REACHED = 429, NO_CREDIT_AVAILABLE = 402, STALE = 503 } -- all others: 403

-- `shared` is one table a worker: several chunks of post-function, and those of an older configuration, share it.
return function(dict, shared)
  local gate = { unlimited = UNLIMITED }
  if not shared.changed then
    shared.changed, shared.seen, shared.stops, shared.figures = {}, {}, {}, {}
    shared.kept, shared.generation, shared.looked, shared.active, shared.active_until = 0, 0, 0, {}, 0
    shared.complained, shared.known, shared.knows, shared.uncounted = 0, {}, 0, {}
  end

  local function complain(text)
    if now() - shared.complained >= 60 or now() < shared.complained then
      shared.complained = now()
      ngx.log(ngx.ERR, "openmeter-gate: ", text)
    end
  end

  local function count(name, n)
    shared.figures[name] = (shared.figures[name] or 0) + (n or 1)
  end

  local function decoded(field)
    return (field:gsub("%%(%x%x)", function(hex) return string.char(tonumber(hex, 16)) end))
  end

  local function encoded(field)
    return (field:gsub("[%%\t\n\r]", function(char) return ("%%%02X"):format(char:byte()) end))
  end

  local function fields(line)
    local all, n = {}, 0
    for field in (line .. "\t"):gmatch("([^\t]*)\t") do
      n = n + 1
      all[n] = decoded(field)
    end
    return all
  end

  -- Numbers are plain decimals; tonumber alone would take 0x10, inf and nan.
  local function number(field)
    return field and field:find("^%-?%d+%.?%d*$") and #field < 30 and tonumber(field) or nil
  end

  -- Settings

  local function listed(text)
    local all = {}
    for item in text:gmatch("[^,]+") do all[#all + 1] = item end
    return all
  end

  local function parse(text)
    local view = { lookups = {}, costs = {}, rules = {}, answers = {}, plans = {}, planned = 0 }
    for line in text:gmatch("[^\n]+") do
      local f = fields(line)
      if f[1] == "C" and f[3] then
        view[f[2]] = f[3]
      elseif f[1] == "L" and f[4] then
        view.lookups[#view.lookups + 1] = { place = f[3], field = f[4] }
      elseif f[1] == "F" and number(f[3]) then
        view.costs[f[2]] = number(f[3])
      elseif f[1] == "R" and f[4] then
        view.rules[#view.rules + 1] = { kind = f[2], value = f[3], features = listed(f[4]) }
        view.per_consumer = view.per_consumer or f[2] == "consumer" or f[2] == "tag"
      elseif f[1] == "W" and f[4] then
        local status = number(f[3])
        view.answers[f[2]] = { status = status and status >= 200 and status <= 599 and status or nil, message = f[4] }
      end
    end
    view.max_stale = number(view.max_stale) or 60
    view.grade = MODES[view.mode] or 0
    return view
  end

  local function current(time)
    local since = time - shared.looked
    if since >= LOOK or since < 0 then
      shared.looked = time
      local at, hash = dict:get("at"), dict:get("settings_hash")
      local epoch, order = dict:get("since_epoch"), dict:get("since_number")
      if epoch ~= shared.epoch or order ~= shared.order or hash ~= shared.hash then
        shared.known, shared.knows, shared.epoch, shared.order = {}, 0, epoch, order
      end
      if at and at > time + 5 then dict:safe_set("at", time) end -- the clock was set back: count from now on
      shared.at = at
      if hash ~= shared.hash then
        local text = dict:get("settings")
        shared.view, shared.hash = text and parse(text), text and hash
      end
    end
    return shared.view
  end

  -- Which features a request needs

  local function has_tag(entity, tag)
    local tags = entity and entity.tags
    if type(tags) == "table" then
      for i = 1, #tags do
        if tags[i] == tag then return true end
      end
    end
    return false
  end

  local function applies(rule, route, service, consumer)
    local kind, value = rule.kind, rule.value
    if kind == "all" then return true end
    if kind == "route" then return route and (route.name == value or route.id == value) end
    if kind == "service" then return service and (service.name == value or service.id == value) end
    if kind == "consumer" then
      return consumer and (consumer.username == value or consumer.custom_id == value or consumer.id == value)
    end
    return kind == "tag" and (has_tag(route, value) or has_tag(service, value) or has_tag(consumer, value))
  end

  local function planned(view, route, service, consumer)
    local names, named = {}, {}
    for i = 1, #view.rules do
      local rule = view.rules[i]
      if applies(rule, route, service, consumer) then
        for j = 1, #rule.features do
          local name = rule.features[j]
          if not named[name] then
            named[name] = true
            names[#names + 1] = name
          end
        end
      end
    end
    return names
  end

  -- Entities are compared by identity: Kong makes new ones when they change.
  local function features_of(view, ctx)
    local route, service = ctx.route, ctx.service
    local id = route and route.id or ""
    local plan = view.plans[id]
    if not plan or plan.route ~= route or plan.service ~= service then
      if view.planned >= MOST then view.plans, view.planned = {}, 0 end
      plan = { route = route, service = service, consumers = {}, known = 0, names = planned(view, route, service) }
      view.plans[id], view.planned = plan, view.planned + 1
    end
    local consumer = view.per_consumer and ctx.authenticated_consumer
    if not consumer then return plan.names end
    local own = plan.consumers[consumer.id]
    if not own or own.consumer ~= consumer then
      if plan.known >= MOST then plan.consumers, plan.known = {}, 0 end
      own = { consumer = consumer, names = planned(view, route, service, consumer) }
      plan.consumers[consumer.id], plan.known = own, plan.known + 1
    end
    return own.names
  end

  -- Who pays: as metering/subject.py finds the subject in the log

  local function text(value)
    return type(value) == "string" and value ~= "" and #value <= 4096 and value or nil
  end

  local function is_anonymous(ctx)
    return not ctx.authenticated_credential and ngx.var.http_x_anonymous_consumer == "true"
  end

  local function tagged_customer(tags)
    local found
    for i = 1, type(tags) == "table" and #tags or 0 do
      local key = type(tags[i]) == "string" and tags[i]:match("^customer:%s*(.-)%s*$")
      if key and found and key ~= found then return nil end
      found = key or found
    end
    return text(found)
  end

  local function looked_up(lookup, view, ctx)
    local place, field, consumer = lookup.place, lookup.field, ctx.authenticated_consumer
    if place == "consumer" then
      if not consumer or not text(consumer.id) or (view.anonymous ~= "on" and is_anonymous(ctx)) then return nil end
      if field == "id" then return (view["prefix.consumer"] or "consumer:") .. consumer.id end
      if field == "tag" then return tagged_customer(consumer.tags) end
      return text(consumer[field])
    elseif place == "application" then
      local application = kong.ctx.shared.kaa_application_context
      if type(application) ~= "table" then return nil end
      if field ~= "id" then return text(application[field]) end
      local id = text(application.application_id)
      return id and (view["prefix.application"] or "app:") .. id
    end
    local found
    if place == "header" then found = kong.request.get_header(field) else found = kong.request.get_query_arg(field) end
    if view.require_consumer == "on" and (not consumer or is_anonymous(ctx)) then return nil end
    return text(found)
  end

  local function subject_of(view, ctx)
    for i = 1, #view.lookups do
      local subject = looked_up(view.lookups[i], view, ctx)
      if subject then return subject end
    end
  end

  -- What is reported to the gate

  local function kept()
    if shared.kept >= MOST then return false end
    shared.kept = shared.kept + 1
    return true
  end

  local function active(subject, time)
    if time >= shared.active_until or time < shared.active_until - SEEN then
      shared.active, shared.active_until = {}, time + SEEN
    end
    if not shared.active[subject] and (shared.seen[subject] or kept()) then
      shared.active[subject], shared.seen[subject] = true, true
    end
  end

  local function changed(feature, account)
    local accounts = shared.changed[feature]
    if not accounts then
      accounts = {}
      shared.changed[feature] = accounts
    end
    accounts[account] = true
  end

  local function stopped(subject, feature, reason, mode)
    local line = "D\t" .. encoded(subject) .. "\t" .. feature .. "\t" .. reason .. "\t" .. mode
    if shared.stops[line] or kept() then shared.stops[line] = (shared.stops[line] or 0) + 1 end
  end

  -- The decision

  local function shown(quota)
    return ("%d"):format(max(0, floor(min(quota, DIGITS_14))))
  end

  -- What the dict says of a subject, remembered until there are news; false: the gate has not decided about it.
  local function customer_of(subject)
    local customer = shared.known[subject]
    if customer == nil then
      if shared.knows >= MOST then shared.known, shared.knows = {}, 0 end
      local account = dict:get("k\t" .. subject)
      customer = account and { account = account, entries = {} } or false
      shared.known[subject], shared.knows = customer, shared.knows + 1
    end
    return customer
  end

  local function entry_of(view, feature, customer)
    local entry = customer.entries[feature]
    if not entry then
      if not view.costs[feature] then
        complain("feature " .. feature .. " is named in Kong, but is none of the gate's: add it to the gate's settings")
      end
      local rest = "\t" .. feature .. "\t" .. customer.account
      local ceiling, reset = dict:get("c" .. rest)
      local quota = dict:get("q" .. rest)
      entry = { ceiling = ceiling, reset = reset or 0, key = "p" .. rest, cost = view.costs[feature] or 1, tail_until = 0 }
      entry.limit, entry.policy = '"' .. feature .. '";r=', quota and '"' .. feature .. '";q=' .. shown(quota)
      customer.entries[feature] = entry
    end
    return entry
  end

  -- The gate must know which logs will come of requests that no counter has: it would take them for those of others.
  local function unseen(view, subject, feature)
    if not shared.seen[subject] and kept() then shared.seen[subject] = true end
    if view.unseen == "deny" then return "CUSTOMER_NOT_FOUND" end
    local line = "U\t" .. encoded(subject) .. "\t" .. feature
    if shared.seen[subject] then shared.uncounted[line] = (shared.uncounted[line] or 0) + 1 end
    return nil
  end

  -- Returns the reason of a denial, what is left (nothing where nothing is counted), and whether it was counted.
  local function consume(view, feature, entry, customer, subject, enforce)
    local ceiling = entry.ceiling
    if type(ceiling) == "string" then return ceiling end
    if ceiling == UNLIMITED then return nil end
    if not ceiling then return unseen(view, subject, feature) end
    changed(feature, customer.account) -- also if it is stopped: a killed worker may have left counts unreported
    if enforce and entry.spent then
      local passed = dict:get(entry.key)
      if passed and passed >= ceiling then return "USAGE_LIMIT_REACHED", 0 end
    end
    local passed = dict:incr(entry.key, entry.cost)
    if not passed then return unseen(view, subject, feature) end -- forgotten just now
    if passed - entry.cost >= ceiling then
      entry.spent = true
      if enforce then dict:incr(entry.key, -entry.cost) end
      return "USAGE_LIMIT_REACHED", 0
    end
    return nil, ceiling - passed, true
  end

  -- In a Kong, 1 us of each request was for the seconds to the reset and for string.format: so the first are kept
  -- for a second, and `..` formats what is left, which it does without an exponent up to 14 digits.
  local function limits(limit, policy, entry, left, time)
    if time >= entry.tail_until or time < entry.tail_until - 1 then
      entry.tail_until = floor(time) + 1
      entry.tail = entry.reset > time and ";t=" .. shown(entry.reset - time) or ""
    end
    local text = entry.limit .. max(0, floor(min(left, DIGITS_14))) .. entry.tail
    if entry.policy then policy = policy and policy .. ", " .. entry.policy or entry.policy end
    return limit and limit .. ", " .. text or text, policy
  end

  local function answer(view, reason, reset, time, headers)
    local set = view.answers[reason]
    if reset > 0 then headers["Retry-After"] = tostring(max(1, math.ceil(reset - time))) end
    local message = set and set.message or "The request is not allowed: " .. reason
    return set and set.status or STATUS[reason] or 403, { message = message, reason = reason }, headers
  end

  -- Returns nothing where the request passes, else status, body and headers of the answer.
  local function consider(conf)
    local time = now()
    local view = current(time)
    local grade = view and view.grade or 0
    if conf.mode then grade = min(grade, MODES[conf.mode] or 0) end
    if grade == 0 then return nil end
    local ctx, enforce = ngx.ctx, grade == 2
    local names = conf.features or features_of(view, ctx)
    if not names[1] then return nil end
    local subject = subject_of(view, ctx)
    local reason, limit, policy, given
    local feature, reset = names[1], 0
    local customer = subject and customer_of(subject)
    if not shared.at or time - shared.at > view.max_stale then
      reason = view.on_stale == "deny" and "STALE" or nil
    elseif not subject then
      reason = view.no_subject == "deny" and "CUSTOMER_NOT_FOUND" or nil
    elseif not customer then
      for i = 1, #names do reason = unseen(view, subject, names[i]) end
    else
      for i = 1, #names do
        local entry = entry_of(view, names[i], customer)
        local why, left, counted = consume(view, names[i], entry, customer, subject, enforce)
        if left and enforce and view.headers ~= "off" then limit, policy = limits(limit, policy, entry, left, time) end
        if why and not reason then reason, reset, feature = why, entry.reset, names[i] end
        if reason and enforce then break end
        if counted and #names > 1 then
          given = given or {}
          given[#given + 1] = entry
        end
      end
    end
    if not reason then
      count("passed")
      if subject then active(subject, time) end
      if limit then ngx.header["RateLimit"] = limit end
      if policy then ngx.header["RateLimit-Policy"] = policy end
      return nil
    end
    stopped(subject or "", feature, reason, enforce and "enforce" or "shadow")
    if not enforce then
      if subject then active(subject, time) end
      return nil
    end
    for i = 1, given and #given or 0 do -- it is not served: what it added to other features goes back
      dict:incr(given[i].key, -given[i].cost)
    end
    return answer(view, reason, reset, time, { ["RateLimit"] = limit, ["RateLimit-Policy"] = policy })
  end

  -- conf.features: the features of this instance, in place of the gate's rules; conf.mode: at most this mode.
  function gate.access(conf)
    local ok, status, body, headers = pcall(consider, conf)
    if not ok then
      count("errors")
      return complain(tostring(status))
    end
    if not status then return nil end
    pcall(kong.log.set_serialize_value, "openmeter_gate", body.reason)
    local done, fault = pcall(kong.response.exit, status, body, headers)
    if not done then
      count("errors")
      pcall(kong.log.set_serialize_value, "openmeter_gate", nil) -- it is served, so it is billed
      complain(tostring(fault))
    end
  end

  gate.complain, gate.count, gate.encoded, gate.fields = complain, count, encoded, fields
  gate.number, gate.parse, gate.kept, gate.changed = number, parse, kept, changed
  return gate
end
