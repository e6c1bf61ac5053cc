-- The queue's transitions, one per command, each atomic. Called by transitions.py beside it, which lists the keys.
--
-- KEYS[1]: the prefix that every key begins with. It carries the hash tag, so all keys lie in one slot of a cluster.
-- ARGV: command, lease (ms), attempts allowed, dead letters kept, then what the command takes. A call of the server takes
-- longest of all here, so what `several` commands of one run need is asked for once.
-- The server's own clock is the only one; times are in ms. Numbers that leave a script are integers.
-- Needs Redis 6.2: XAUTOCLAIM, XPENDING ... IDLE, exclusive ranges.

local prefix, command = KEYS[1], ARGV[1]
local lease_ms, max_attempts, max_dead = tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local call = redis.call
local CLASSES = {'high', 'normal', 'low'}
local GROUP = 'workers'
local RECORD_BYTES = 2048  -- as service/queue/contract.py has it
local MARGIN_MS = 60000  -- keys outlive their entry in an index by this much, so that the index decides while anyone calls

local clock = call('TIME')
local now = clock[1] * 1000 + math.floor(clock[2] / 1000)

local function key(...) return table.concat({prefix, ...}, ':') end
local function whole(number) return string.format('%.0f', number) end
local STREAMS = {high = key('jobs', 'high'), normal = key('jobs', 'normal'), low = key('jobs', 'low')}
local function stream_of(class) return STREAMS[class] end
local function add_bytes(size) if size ~= 0 then call('INCRBY', key('bytes'), whole(size)) end end

-- Unfinished jobs of a class. Whoever adds or takes away one clears what is known.
local lengths = {}
local function length_of(class)
  lengths[class] = lengths[class] or call('XLEN', stream_of(class))
  return lengths[class]
end

-- Who holds an entry, for how many ms without a sign, and how often it was delivered; nothing if it was never taken.
local function delivery_of(class, entry)
  local found = call('XPENDING', stream_of(class), GROUP, entry, entry, 1)
  if #found == 0 then return nil, 0, 0 end
  return found[1][2], found[1][3], found[1][4]
end

local function fields_of(class, entry)
  local found = call('XRANGE', stream_of(class), entry, entry)
  local fields = {}
  if #found == 1 then
    for i = 1, #found[1][2], 2 do fields[found[1][2][i]] = found[1][2][i + 1] end
  end
  return fields
end

local function drop_dead_letter(id)
  local entry = call('HGET', key('dead-index'), id)
  if not entry then return false end
  local size = call('HGET', key('dead-payload', id), 'size')
  call('XDEL', key('dead'), entry)
  call('HDEL', key('dead-index'), id)
  call('UNLINK', key('dead-payload', id))
  add_bytes(-(tonumber(size) or 0))
  return true
end

local function drop_oldest_dead_letter()
  local oldest = call('XRANGE', key('dead'), '-', '+', 'COUNT', 1)
  if #oldest == 0 then return false end
  if not drop_dead_letter(oldest[1][2][2]) then call('XDEL', key('dead'), oldest[1][1]) end
  return true
end

-- Give a job its one visible end: acknowledge, delete, keep the result for a while, tell who waits and who works.
-- result_size: bytes of its pictures. buries: keep the job as a dead letter. teller: the worker that reports it.
-- record: the result, if it is short; inboxes whose name ends with + are told it along.
local function finish(id, code, message, result_size, buries, teller, record)
  local job = key('job', id)
  local known = call('HMGET', job, 'class', 'entry', 'size', 'ttl', 'idem', 'waiters', 'keep')
  local class, entry, size, ttl, idem, waiters, keep = unpack(known)
  call('ZREM', key('deadlines'), id)
  if not entry then return false end  -- unknown, or it has ended already
  local holder, _, attempts = delivery_of(class, entry)
  local payload, kept_size = key('payload', id), 0
  result_size = result_size + RECORD_BYTES
  if buries and call('EXISTS', payload) == 1 then
    call('RENAME', payload, key('dead-payload', id))
    call('PERSIST', key('dead-payload', id))
    call('HSET', key('dead-payload', id), 'size', size)
    local letter = call('XADD', key('dead'), '*', 'id', id, 'header', fields_of(class, entry).header or '',
      'code', code, 'message', message, 'attempts', attempts, 'failed', whole(now))
    call('HSET', key('dead-index'), id, letter)
    kept_size = tonumber(size)
  else
    call('UNLINK', payload)
  end
  call('XACK', stream_of(class), GROUP, entry)
  call('XDEL', stream_of(class), entry)
  lengths[class] = nil
  add_bytes(kept_size + result_size - tonumber(size))
  while buries and call('HLEN', key('dead-index')) > max_dead and drop_oldest_dead_letter() do end
  call('HDEL', job, 'entry', 'waiters')
  call('HSET', job, 'finished', whole(now), 'code', code, 'message', message, 'attempts', attempts,
    'result_size', result_size)
  -- The job itself stays until it is swept, however long nobody calls: its bytes are still to be taken off.
  call('ZADD', key('finished'), whole(now + ttl), id)
  if idem then call('PEXPIRE', key('idem', idem), whole(ttl + MARGIN_MS)) end
  if record then call('SET', key('result', id), record, 'PX', whole(ttl + MARGIN_MS)) end
  for inbox in string.gmatch(waiters or '', '%S+') do
    local takes_records = record and string.sub(inbox, -1) == '+'
    call('PUBLISH', inbox, takes_records and id .. ' ' .. keep .. ' ' .. record or id)
  end
  if holder and holder ~= teller then call('PUBLISH', key('worker', holder), id) end
  return true
end

-- Forget a job that has ended.
local function forget(id)
  local result_size, idem = unpack(call('HMGET', key('job', id), 'result_size', 'idem'))
  if not result_size and call('EXISTS', key('job', id)) == 1 then return end
  call('ZREM', key('finished'), id)
  call('UNLINK', key('job', id), key('result', id))
  if idem then call('DEL', key('idem', idem)) end
  add_bytes(-(tonumber(result_size) or 0))
end

local function sweep_deadlines()
  repeat
    local late = call('ZRANGEBYSCORE', key('deadlines'), '-inf', whole(now), 'LIMIT', 0, 128)
    for _, id in ipairs(late) do
      finish(id, 'timed_out', "the job's deadline passed before there was a result", 0, false, nil)
    end
  until #late < 128
end

-- Jobs of a class whose worker is lost or handed them back, as XPENDING tells of them.
local function lapsed_of(class, most)
  if length_of(class) == 0 then return {} end
  return call('XPENDING', stream_of(class), GROUP, 'IDLE', lease_ms, '-', '+', most)
end

-- Bring the state up to the present: deadlines, workers lost once too often, results that were kept long enough.
local is_swept = false
local function sweep()
  if is_swept then return end
  sweep_deadlines()
  for _, class in ipairs(CLASSES) do
    for _, lapsed in ipairs(lapsed_of(class, 1024)) do
      if lapsed[4] >= max_attempts then
        local message = 'the job was given up after ' .. lapsed[4] .. ' workers were lost with it'
        finish(fields_of(class, lapsed[1]).id, 'attempts_exhausted', message, 0, true, nil)
      end
    end
  end
  repeat
    local old = call('ZRANGEBYSCORE', key('finished'), '-inf', whole(now), 'LIMIT', 0, 128)
    for _, id in ipairs(old) do forget(id) end
  until #old < 128
  is_swept = true
end

local function last_delivered(class)
  local group = call('XINFO', 'GROUPS', stream_of(class))[1]
  for i = 1, #group, 2 do
    if group[i] == 'last-delivered-id' then return group[i + 1] end
  end
end

-- When the longest-waiting job of a class came, in ms; nil if none waits.
local function waiting_since(class)
  if length_of(class) == 0 then return nil end
  local stream, since = stream_of(class), nil
  local fresh = call('XRANGE', stream, '(' .. last_delivered(class), '+', 'COUNT', 1)
  local lapsed = lapsed_of(class, 1)
  for _, found in ipairs({fresh[1] or false, lapsed[1] or false}) do
    if found then
      local arrived = tonumber(string.match(found[1], '^%d+'))
      if not since or arrived < since then since = arrived end
    end
  end
  return since
end

-- A row of what `take` answers: class, entry, delivery count, then the entry's fields.
local function row_of(class, entry, fields)
  local _, _, attempts = delivery_of(class, entry)
  return {class, entry, attempts, fields}
end

-- Up to count jobs of one class for a worker: first those whose worker is lost or handed them back, then fresh ones.
local function take_from(class, worker, count, rows)
  local stream, most, cursor = stream_of(class), #rows + count, '0-0'
  repeat
    local claimed = call('XAUTOCLAIM', stream, GROUP, worker, lease_ms, cursor, 'COUNT', most - #rows)
    cursor = claimed[1]
    for _, found in ipairs(claimed[2]) do
      if found and found[2] then rows[#rows + 1] = row_of(class, found[1], found[2]) end
    end
  until cursor == '0-0' or #rows >= most
  if #rows >= most then return end
  local fresh = call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', most - #rows, 'STREAMS', stream, '>')
  for _, found in ipairs(fresh and fresh[1][2] or {}) do rows[#rows + 1] = {class, found[1], 1, found[2]} end
end

local waited_at = {STREAMS.high, STREAMS.normal, STREAMS.low, key('wake')}
if call('EXISTS', unpack(waited_at)) < #waited_at then
  for _, stream in ipairs(waited_at) do
    if call('EXISTS', stream) == 0 then call('XGROUP', 'CREATE', stream, GROUP, '0', 'MKSTREAM') end
  end
end

local commands = {}

-- Nothing but what every call does first: the streams and their group exist.
function commands.prepare() return 1 end

-- id, class, header, created, deadline ('' if none), size, ttl, payload ttl, keep, idempotency key, fingerprint,
-- jobs allowed, bytes allowed, inbox to tell when it ends ('' if none), bytes of the images that lie in the shared
-- folder. If 0, the payload has been written, with its ttl, by the same transaction.
function commands.submit(id, class, header, created, deadline, size, ttl, payload_ttl, keep, idem, fingerprint,
                         max_jobs, max_bytes, inbox, beside)
  local payload = key('payload', id)
  if call('EXISTS', key('job', id)) == 1 then  -- a repetition by a caller that did not hear the answer
    if call('HEXISTS', key('job', id), 'entry') == 0 then call('UNLINK', payload) end
    return {'accepted', id}
  end
  sweep()
  if idem ~= '' then
    local known = call('GET', key('idem', idem))
    if known then
      call('UNLINK', payload)
      local first, used_for = string.match(known, '^(%S+) (%S+)$')
      if used_for ~= fingerprint then return {'conflict', ''} end
      return {'known', first}
    end
  end
  local num_jobs = 0
  for _, name in ipairs(CLASSES) do num_jobs = num_jobs + length_of(name) end
  if num_jobs >= tonumber(max_jobs) then
    call('UNLINK', payload)
    return {'full', num_jobs .. ' jobs'}
  end
  -- New work comes before old failures.
  local bytes = tonumber(call('GET', key('bytes')) or 0)
  while bytes + size > tonumber(max_bytes) and drop_oldest_dead_letter() do bytes = tonumber(call('GET', key('bytes'))) end
  if bytes + size > tonumber(max_bytes) then
    call('UNLINK', payload)
    return {'full', whole(bytes) .. ' bytes'}
  end
  lengths[class] = nil
  local entry
  if beside ~= '0' then
    entry = call('XADD', stream_of(class), '*', 'id', id, 'deadline', deadline, 'header', header, 'beside', beside)
    call('HSET', payload, 'beside', beside)
    call('PEXPIRE', payload, payload_ttl)
  else
    entry = call('XADD', stream_of(class), '*', 'id', id, 'deadline', deadline, 'header', header)
  end
  call('HSET', key('job', id), 'class', class, 'entry', entry, 'created', created, 'deadline', deadline,
    'size', size, 'ttl', ttl, 'keep', keep, 'waiters', inbox)
  if idem ~= '' then
    call('HSET', key('job', id), 'idem', idem)
    call('SET', key('idem', idem), id .. ' ' .. fingerprint, 'PX', payload_ttl)
  end
  if deadline ~= '' then call('ZADD', key('deadlines'), deadline, id) end
  add_bytes(tonumber(size))
  return {'accepted', id}
end

-- id, inbox to tell when it ends ('' if none).
function commands.look(id, inbox)
  sweep()
  local known = call('HMGET', key('job', id), 'class', 'entry', 'code', 'message', 'deadline', 'keep', 'waiters')
  local class, entry, code, message, deadline, keep, waiters = unpack(known)
  if not class then return {'unknown'} end
  if not entry then return {'ended', code, message, keep} end
  if inbox ~= '' and not string.find(waiters or '', inbox, 1, true) then
    call('HSET', key('job', id), 'waiters', (waiters and waiters .. ' ' or '') .. inbox)
  end
  return {'open', deadline}
end

function commands.forget(...)
  for _, id in ipairs({...}) do forget(id) end
  return 1
end

function commands.cancel(id, message)
  sweep()
  finish(id, 'cancelled', message, 0, false, nil)
  return commands.view(id)
end

function commands.view(id)
  sweep()
  local known = call('HMGET', key('job', id), 'class', 'entry', 'code', 'message', 'attempts', 'created', 'deadline',
    'finished')
  local class, entry, code, message, attempts, created, deadline, finished = unpack(known)
  if not class then return {} end
  local state = 'ended'
  if entry then
    local holder, idle, count = delivery_of(class, entry)
    state = holder and idle < lease_ms and 'running' or 'queued'
    attempts = whole(count)
  end
  return {state, class, code or '', message or '', attempts, created, deadline, finished or ''}
end

-- Answers: waiting jobs by class, jobs at workers, bytes, ms since the oldest waiting job came, dead letters.
function commands.stats()
  sweep()
  local depths, num_leased, oldest = {}, 0, now
  for _, class in ipairs(CLASSES) do
    local pending = call('XPENDING', stream_of(class), GROUP)[1]
    local lapsed = pending > 0 and #call('XPENDING', stream_of(class), GROUP, 'IDLE', lease_ms, '-', '+', pending) or 0
    depths[#depths + 1] = length_of(class) - pending + lapsed
    num_leased = num_leased + pending - lapsed
    oldest = math.min(oldest, waiting_since(class) or now)
  end
  return {depths[1], depths[2], depths[3], num_leased, tonumber(call('GET', key('bytes')) or 0), now - oldest,
    call('HLEN', key('dead-index'))}
end

-- worker id, description, ms that it holds good for.
function commands.announce(id, info, ttl)
  if tonumber(ttl) > 0 then
    call('HSET', key('workers'), id, info)
    call('ZADD', key('workers-until'), whole(now + ttl), id)
    call('SREM', key('workers-gone'), id)
  else
    call('HDEL', key('workers'), id)
    call('ZREM', key('workers-until'), id)
    call('SADD', key('workers-gone'), id)
  end
  return 1
end

-- Answers the descriptions of the workers that are there. Those that are gone are forgotten as consumers, too, once
-- they hold nothing any more: a worker that was lost with jobs is silent long before its leases end.
function commands.workers()
  for _, id in ipairs(call('ZRANGEBYSCORE', key('workers-until'), '-inf', whole(now))) do
    commands.announce(id, '', 0)
  end
  for _, id in ipairs(call('SMEMBERS', key('workers-gone'))) do
    local holds = false
    for _, class in ipairs(CLASSES) do
      holds = holds or #call('XPENDING', stream_of(class), GROUP, '-', '+', 1, id) > 0
    end
    if not holds then
      for _, class in ipairs(CLASSES) do call('XGROUP', 'DELCONSUMER', stream_of(class), GROUP, id) end
      call('XGROUP', 'DELCONSUMER', key('wake'), GROUP, id)
      call('SREM', key('workers-gone'), id)
    end
  end
  return call('HVALS', key('workers'))
end

-- worker, jobs to take, starvation (ms).
function commands.take(worker, count, starvation)
  sweep()
  local rows, since, num_waiting = {}, {}, 0
  for _, class in ipairs(CLASSES) do
    since[class] = waiting_since(class)
    if since[class] then num_waiting = num_waiting + 1 end
  end
  while num_waiting > 1 and #rows < tonumber(count) do  -- with one class there is nobody to overtake
    local starved
    for _, class in ipairs(CLASSES) do
      local is_starved = since[class] and since[class] <= now - starvation
      if is_starved and (not starved or since[class] < since[starved]) then starved = class end
    end
    if not starved then break end
    take_from(starved, worker, 1, rows)
    since[starved] = waiting_since(starved)
  end
  for _, class in ipairs(CLASSES) do
    if since[class] and #rows < count + 0 then take_from(class, worker, count - #rows, rows) end
  end
  return rows
end

-- worker, 1 if the deliveries were never worked on (an answer was lost) else 0, then class/entry of all it knows.
-- Answers, as `take` does, the jobs that Redis counts as this worker's and that it knows nothing of.
function commands.recover(worker, is_untouched, ...)
  local known, rows = {}, {}
  for _, entry in ipairs({...}) do known[entry] = true end
  sweep()
  for _, class in ipairs(CLASSES) do
    for _, found in ipairs(call('XPENDING', stream_of(class), GROUP, '-', '+', 1024, worker)) do
      local entry, count = found[1], found[4]
      if not known[class .. '/' .. entry] then
        local fields = call('XRANGE', stream_of(class), entry, entry)
        if is_untouched == '0' and count >= max_attempts then
          local message = 'the job was given up after ' .. count .. ' workers were lost with it'
          finish(fields_of(class, entry).id, 'attempts_exhausted', message, 0, true, nil)
        elseif fields[1] then
          if is_untouched == '0' then count = count + 1 end
          call('XCLAIM', stream_of(class), GROUP, worker, 0, entry, 'RETRYCOUNT', count, 'JUSTID')
          rows[#rows + 1] = {class, entry, count, fields[1][2]}
        end
      end
    end
  end
  return rows
end

-- worker, then class, entry, attempt and id of each lease. Answers 'kept', 'ended' or 'lost' for each.
function commands.renew(worker, ...)
  sweep_deadlines()  -- not the leases: a late sign of life is better than a lost job
  local leases, states = {...}, {}
  for i = 1, #leases, 4 do
    local class, entry, attempt, id = leases[i], leases[i + 1], tonumber(leases[i + 2]), leases[i + 3]
    local holder, _, count = delivery_of(class, entry)
    if holder == worker and count == attempt then
      call('XCLAIM', stream_of(class), GROUP, worker, 0, entry, 'JUSTID')
      states[#states + 1] = 'kept'
    else
      states[#states + 1] = call('HEXISTS', key('job', id), 'entry') == 1 and 'lost' or 'ended'
    end
  end
  return states
end

-- worker, 1 if they were tried else 0, then class, entry and attempt of each lease. The entries keep their place in the
-- stream; they count as idle for ever, so the next taker claims them, or the sweep gives up what was tried too often.
-- What was not tried loses this attempt. Blocked takers only see new entries, hence the wake stream.
function commands.release(worker, was_tried, ...)
  local leases, num_released = {...}, 0
  for i = 1, #leases, 3 do
    local class, entry, attempt = leases[i], leases[i + 1], tonumber(leases[i + 2])
    local holder, _, count = delivery_of(class, entry)
    if holder == worker and count == attempt then
      local tries = was_tried == '1' and attempt or attempt - 1
      call('XCLAIM', stream_of(class), GROUP, 'released', 0, entry, 'TIME', 1, 'RETRYCOUNT', tries, 'JUSTID')
      num_released = num_released + 1
    end
  end
  for _ = 1, num_released do call('XADD', key('wake'), 'MAXLEN', 64, '*', 'released', 1) end
  return num_released
end

-- id, worker, error code or '', message, bytes of the pictures, whether it becomes a dead letter, pending result's name,
-- and the result itself if it is short. Else it has been written under that name by the same transaction; it becomes
-- visible now or never.
function commands.finish(id, worker, code, message, result_size, buries, pending, record)
  local is_first = finish(id, code, message, tonumber(result_size), buries == '1', worker, record)
  if record then return is_first and 1 or 0 end
  if is_first then
    call('RENAME', key('pending-result', pending), key('result', id))
    call('PEXPIRE', key('result', id), whole(call('HGET', key('job', id), 'ttl') + MARGIN_MS))
  else
    call('UNLINK', key('pending-result', pending))
  end
  return is_first and 1 or 0
end

function commands.dead_letter(id)
  local entry = call('HGET', key('dead-index'), id)
  return entry and call('XRANGE', key('dead'), entry, entry) or {}
end

-- How many words there are, and all of them as one string, each behind its length. Of each command these are: how many
-- it is, its name, and what it takes. Answers all their answers. One that fails changes nothing for the others, but where
-- the server takes no writes: that is the answer to all, since a client must see it to look for another server.
function commands.several(count, packed)
  local words, answers, at = {struct.unpack(string.rep('<I4c0', count), packed)}, {}, 1
  while at <= tonumber(count) do
    local last = at + words[at]
    local is_done, answer = pcall(commands[words[at + 1]], unpack(words, at + 2, last))
    if not is_done then
      if type(answer) ~= 'table' then answer = {err = answer} end
      if string.find(answer.err, 'READONLY', 1, true) then return answer end
    end
    answers[#answers + 1] = answer
    at = last + 1
  end
  return answers
end

function commands.drop_dead_letter(id) return drop_dead_letter(id) and 1 or 0 end

local arguments = {}
for i = 5, #ARGV do arguments[#arguments + 1] = ARGV[i] end
return commands[command](unpack(arguments))
