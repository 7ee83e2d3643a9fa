"""The scripts that Redis runs, one for every budget operation, each whole and undisturbed by others.

Lua counts in doubles, exact up to 2**53. Pico-dollars do not fit, so dollars are sent and stored in two parts,
whole micro-dollars and the pico-dollars below; every other number is small enough.

One tree of budgets is three keys: ``meters`` (hash of path to a packed meter), ``holds`` (hash of id to a packed
hold) and ``expiry`` (sorted set of hold ids by microsecond; an id after a NUL is a lapsed hold, to be forgotten then).

Any of them, or any field, may be lost: evicted by the server, deleted at its console. A meter that is gone refuses; one
that was opened again has another birth, and holds from before it take nothing back from it. A hold that is gone stays
held. An index that is gone is made again from the holds. What is no meter or hold is an error before anything is
written. So less may be given out than the limit, and never more.
"""

DAMAGED = "S2T_DAMAGED"
"""Begins the error of a script that found something else than a meter or a hold."""

PART = 1_000_000
"""Pico-dollars in a micro-dollar."""

_CLOCK = r"""
local METERS, HOLDS, EXPIRY = KEYS[1], KEYS[2], KEYS[3]
local PART, KEEP_LAPSED_US = 1000000, 604800000000
local call = redis.call
local args = cjson.decode(ARGV[1])  -- one text: clients are slow at sending many
local t = call('TIME')
local now = args[2] or t[1] * 1000000 + t[2]  -- a time is only given by tests

-- An amount is {micro-dollars, pico-dollars, escalations, LLM tokens, unpriced, answers, their tokens}; the last two
-- are missing where they were not counted yet. A limit is the same, false or missing for none.
-- A meter is {terms, limit, spent, held, over, micros, deadline, window_us, offset_us, window, holds, birth}.
-- A hold is {1 if lapsed, amount, paths, expiry in us, births of the meters}.
local TERMS, LIMIT, SPENT, HELD, OVER, MICROS, DEADLINE = 1, 2, 3, 4, 5, 6, 7
local WINDOW_US, OFFSET_US, WINDOW, COUNT, BIRTH = 8, 9, 10, 11, 12

local function sound(ok) if not ok then error('S2T_DAMAGED') end end
local function whole(n) return type(n) == 'number' and n >= 0 and n < 9007199254740992 and n == math.floor(n) end
local function amount(a)
  return type(a) == 'table' and whole(a[1]) and whole(a[2]) and a[2] < PART and whole(a[3]) and whole(a[4])
    and whole(a[5]) and whole(a[6] or 0) and whole(a[7] or 0)
end
local function within(a, most)  -- a sum, which may be more than a double holds exactly
  local enough = a[1] < most[1] or (a[1] == most[1] and a[2] <= most[2])
  for i = 3, 7 do enough = enough and (a[i] or 0) <= most[i] end
  return enough
end
local function unpacked(packed)
  local ok, found = pcall(cmsgpack.unpack, packed)
  sound(ok and type(found) == 'table')
  return found
end
local function texts_only(list)
  if type(list) ~= 'table' then return false end
  for _, each in ipairs(list) do if type(each) ~= 'string' then return false end end
  return #list > 0
end
local function unpacked_hold(packed)
  local hold = unpacked(packed)
  sound((hold[1] == 0 or hold[1] == 1) and amount(hold[2]) and texts_only(hold[3]) and whole(hold[4]))
  return hold
end
"""

_ADD = r"""
local function plus(a, b, sign)
  local lo = a[2] + sign * b[2]
  a[1], a[2] = a[1] + sign * b[1] + math.floor(lo / PART), lo % PART
  for i = 3, 7 do a[i] = (a[i] or 0) + sign * (b[i] or 0) end
end
"""

_MORE = r"""
local function more(a1, a2, b1, b2) return a1 > b1 or (a1 == b1 and a2 > b2) end
"""

_TEXT = r"""
local function text(n) return string.format('%.0f', n) end
local function texts(list, length)  -- false and nil are empty
  local out = {}
  for i = 1, length do out[i] = list[i] and text(list[i]) or '' end
  return out
end
"""

_METER = r"""
local function load(path)
  local packed = call('HGET', METERS, path)
  if not packed then return nil end
  local m = unpacked(packed)
  local limit = m[LIMIT]
  sound(type(m[TERMS]) == 'string' and type(limit) == 'table' and amount(m[SPENT]) and amount(m[HELD]))
  sound(amount(m[OVER]) and whole(m[COUNT]) and whole(m[BIRTH] or 0))
  for i = 1, 7 do sound(not limit[i] or whole(limit[i])) end
  for i = 1, 4 do sound(limit[i] ~= nil) end
  sound(not limit[1] == not limit[2])
  sound(not m[MICROS] or whole(m[MICROS]))
  sound(not m[DEADLINE] or (whole(m[DEADLINE]) and m[MICROS]))
  sound(not m[WINDOW_US] or (whole(m[WINDOW_US]) and m[WINDOW_US] > 0 and type(m[OFFSET_US]) == 'number'
    and type(m[WINDOW]) == 'number' and m[WINDOW] == m[WINDOW]))
  if m[WINDOW_US] then
    local index = math.floor((now - m[OFFSET_US]) / m[WINDOW_US])
    if index > m[WINDOW] then
      m[WINDOW], m[SPENT], m[OVER] = index, {0, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}
    end
  end
  return m
end
local function save(path, m) call('HSET', METERS, path, cmsgpack.pack(m)) end
"""

_REFUSE = r"""
local COUNTED = {3, 4, 6, 7}  -- where an amount has what is no money
local function refusing(m, want, need)  -- the first unit that does not fit: 0 is time, 1 money, 2 to 5 COUNTED
  if m[DEADLINE] and now >= m[DEADLINE] then return 0 end
  local limit, spent, held = m[LIMIT], m[SPENT], m[HELD]
  if limit[1] and (want[1] > 0 or want[2] > 0) then
    local lo = spent[2] + held[2] + need[2]
    local hi = spent[1] + held[1] + need[1] + math.floor(lo / PART)
    if more(hi, lo % PART, limit[1], limit[2]) then return 1 end
  end
  for unit, i in ipairs(COUNTED) do
    if limit[i] and want[i] > 0 and (spent[i] or 0) + (held[i] or 0) + need[i] > limit[i] then return unit + 1 end
  end
end
"""

_BOOK = r"""
local function book(m, reserved, actual)
  plus(m[SPENT], actual, 1)
  local over = m[OVER]
  if more(actual[1], actual[2], reserved[1], reserved[2]) then
    plus(over, {actual[1] - reserved[1], actual[2] - reserved[2], 0, 0, 0}, 1)
  end
  for _, i in ipairs({3, 4, 6, 7}) do
    over[i] = (over[i] or 0) + math.max(0, (actual[i] or 0) - (reserved[i] or 0))
  end
end
"""

_LAPSE = r"""
local function held_by(hold, at, m)  -- whether what this meter holds counts the hold: it was not opened again since
  local births = hold[5]
  return hold[1] == 0 and (m[BIRTH] or 0) == (type(births) == 'table' and births[at] or 0)
end
local function let_go(m, want)
  plus(m[HELD], want, -1)
  m[COUNT] = m[COUNT] - 1
  sound(amount(m[HELD]) and m[COUNT] >= 0)
end
local function give_back(hold)  -- to those of its meters that are there, all or none
  local paths, meters = {}, {}
  for at, path in ipairs(hold[3]) do
    local m = load(path)
    if m and held_by(hold, at, m) then
      let_go(m, hold[2])
      paths[#paths + 1], meters[#meters + 1] = path, m
    end
  end
  for i, m in ipairs(meters) do save(paths[i], m) end
end
local function indexed()  -- the index, made again where it is gone: every hold has its place in it
  if call('EXISTS', EXPIRY) == 1 or call('EXISTS', HOLDS) == 0 then return end
  local all = call('HGETALL', HOLDS)
  for i = 1, #all, 2 do
    local hold = unpacked_hold(all[i + 1])
    if hold[1] == 0 then
      call('ZADD', EXPIRY, text(hold[4]), all[i])
    else
      call('ZADD', EXPIRY, text(now + KEEP_LAPSED_US), '\0' .. all[i])
    end
  end
end
local function lapse()
  indexed()
  while true do
    local due = call('ZRANGEBYSCORE', EXPIRY, '-inf', text(now), 'LIMIT', 0, 100)
    if #due == 0 then return end
    for _, id in ipairs(due) do
      if string.sub(id, 1, 1) == '\0' then
        call('HDEL', HOLDS, string.sub(id, 2))
      else
        local packed = call('HGET', HOLDS, id)
        if packed then  -- one that is gone stays held
          local hold = unpacked_hold(packed)
          give_back(hold)
          hold[1] = 1
          call('HSET', HOLDS, id, cmsgpack.pack(hold))
          call('ZADD', EXPIRY, text(now + KEEP_LAPSED_US), '\0' .. id)
        end
      end
      call('ZREM', EXPIRY, id)
    end
  end
end
"""

_OPEN = r"""
-- path, terms, limit {7} (false is none), deadline in us, window in us, offset in us
local path = args[3]
local m = load(path)
if m then return m[TERMS] end
local micros, window, offset = args[6], args[7], args[8]
save(path, {
  args[4], args[5], {0, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0},
  micros, micros and now + micros, window, offset, window and math.floor((now - offset) / window), 0,
  t[1] * 1000000 + t[2]})
return args[4]
"""

_FIND_TERMS = r"""
-- path
local m = load(args[3])
return m and m[TERMS]
"""

_RESERVE = r"""
-- hold, ttl in us, want {7}, the largest sum {7}, then per link: path, need {7}
lapse()
local want, paths, meters, births = args[5], {}, {}, {}
for at = 7, #args, 2 do
  local path = args[at]
  local m = load(path)
  if not m then return {'missing', path} end
  local unit = refusing(m, want, args[at + 1])
  if unit == 0 then return {'refused', path, '0', texts({m[MICROS], m[MICROS] + now - m[DEADLINE]}, 2)} end
  if unit then
    return {'refused', path, tostring(unit), texts(m[LIMIT], 7), texts(m[SPENT], 7), texts(m[HELD], 7)}
  end
  plus(m[HELD], want, 1)
  m[COUNT] = m[COUNT] + 1
  local all = {unpack(m[HELD])}
  plus(all, m[SPENT], 1)
  if not within(all, args[6]) then return {'above', texts(all, 7)} end
  paths[#paths + 1], meters[#meters + 1], births[#births + 1] = path, m, m[BIRTH] or 0
end
call('HSET', HOLDS, args[3], cmsgpack.pack({0, want, paths, now + args[4], births}))
call('ZADD', EXPIRY, text(now + args[4]), args[3])
for i, m in ipairs(meters) do save(paths[i], m) end
return {'held'}
"""

_FINISH = r"""
-- hold, then what was used {7} and the largest sum {7}, or nothing to release
local packed = call('HGET', HOLDS, args[3])
if not packed then return 'gone' end
local hold, actual = unpacked_hold(packed), args[4]
if hold[1] == 0 and now >= hold[4] then
  lapse()
  hold = unpacked_hold(call('HGET', HOLDS, args[3]) or packed)
end
local late, paths, meters = hold[1] == 1, {}, {}
for at, path in ipairs(hold[3]) do
  local m = load(path)
  if m then
    local counted = held_by(hold, at, m)
    if counted then let_go(m, hold[2]) end
    if actual then book(m, counted and hold[2] or {0, 0, 0, 0, 0, 0, 0}, actual) end
    if actual and not within(m[SPENT], args[5]) then return {'above', texts(m[SPENT], 7)} end
    late = late or not counted
    paths[#paths + 1], meters[#meters + 1] = path, m
  end
end
if actual and #meters == 0 then return {'missing', hold[3][1]} end  -- it is booked when they were opened again
call('ZREM', EXPIRY, hold[1] == 1 and '\0' .. args[3] or args[3])
call('HDEL', HOLDS, args[3])
for i, m in ipairs(meters) do save(paths[i], m) end
return late and 'late' or 'done'
"""

_EXTEND = r"""
-- path, amount {7}, microseconds, what names the grant (empty: nothing does), the largest limit {7} and microseconds
local m = load(args[3])
if not m then return 'missing' end
local grant = args[3] .. '\0' .. args[6]  -- no path holds a NUL
if args[6] ~= '' and call('HEXISTS', METERS, grant) == 1 then return 'known' end
local limit, by, micros = m[LIMIT], args[4], args[5]
local sum = {limit[1] or 0, limit[2] or 0, limit[3] or 0, limit[4] or 0, 0, limit[6] or 0, limit[7] or 0}
plus(sum, by, 1)
for i = 1, #limit do limit[i] = limit[i] and sum[i] end
if m[DEADLINE] and micros > 0 then
  local past = math.max(0, now - m[DEADLINE])
  m[MICROS], m[DEADLINE] = m[MICROS] + micros + past, m[DEADLINE] + past + micros
end
local given, time = {}, m[MICROS] or 0  -- 0 where there is no limit
for i = 1, 7 do given[i] = limit[i] or 0 end
if not within(given, args[7]) or time > args[8] then return {'above', texts(limit, 7), text(time)} end
save(args[3], m)
if args[6] ~= '' then call('HSET', METERS, grant, 1) end
return 'done'
"""

_READ_STATE = r"""
-- path
lapse()
local m = load(args[3])
if not m then return {} end
local left = m[DEADLINE] and math.max(0, m[DEADLINE] - now)
return {
  texts(m[LIMIT], 7), texts(m[SPENT], 7), texts(m[HELD], 7), texts(m[OVER], 7),
  texts({m[MICROS], left, m[COUNT], m[WINDOW]}, 4)}
"""

SCRIPTS = {
    "open": _CLOCK + _METER + _OPEN,
    "find_terms": _CLOCK + _METER + _FIND_TERMS,
    "reserve": _CLOCK + _ADD + _MORE + _TEXT + _METER + _REFUSE + _LAPSE + _RESERVE,
    "finish": _CLOCK + _ADD + _MORE + _TEXT + _METER + _BOOK + _LAPSE + _FINISH,
    "extend": _CLOCK + _ADD + _TEXT + _METER + _EXTEND,
    "read_state": _CLOCK + _ADD + _TEXT + _METER + _LAPSE + _READ_STATE,
}
"""By operation: only what it needs, since Redis defines every function anew at each call."""
