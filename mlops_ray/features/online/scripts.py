"""What a Redis server runs of the online store: each script is one atomic step.

The rows of a view are one hash, entity key → packed row. While a view is replaced, the new rows are
filled into a hash of their own, which takes the place of the old one in the end; what is written
meanwhile goes into both. Its name ends with a token, so that the leavings of a killed process, or
another one at the same work, are never taken for one's own.
"""

from __future__ import annotations

# Times are compared as two halves of 32 bits: Lua's numbers are exact only up to 2^53.
_PUT = """
local function put(key, field, value)
  local stored = redis.call('HGET', key, field)
  if stored then
    local el, eh, cl, ch = struct.unpack('<I4i4I4i4', stored, 9)
    local nel, neh, ncl, nch = struct.unpack('<I4i4I4i4', value, 9)
    if neh < eh then return 0 end
    if neh == eh then
      if nel < el then return 0 end
      if nel == el and (nch < ch or (nch == ch and ncl < cl)) then return 0 end
    end
  end
  redis.call('HSET', key, field, value)
  return 1
end
local function fill_key(rows, token) return rows .. ':fill:' .. token end
"""

WRITE = (
    _PUT
    + """
-- KEYS: rows, fillings, layouts, views; ARGV: schema, layout, then field and value of each row
redis.call('HSETNX', KEYS[3], ARGV[1], ARGV[2])
redis.call('SADD', KEYS[4], KEYS[1])
local token = redis.call('HGET', KEYS[2], KEYS[1])
local written = 0
for i = 3, #ARGV, 2 do
  written = written + put(KEYS[1], ARGV[i], ARGV[i + 1])
  if token then put(fill_key(KEYS[1], token), ARGV[i], ARGV[i + 1]) end
end
return written
"""
)

BEGIN = (
    _PUT
    + """
-- KEYS: rows, fillings, layouts, views; ARGV: schema, layout, token
redis.call('HSETNX', KEYS[3], ARGV[1], ARGV[2])
redis.call('SADD', KEYS[4], KEYS[1])
local other = redis.call('HGET', KEYS[2], KEYS[1])
if other then redis.call('UNLINK', fill_key(KEYS[1], other)) end
redis.call('HSET', KEYS[2], KEYS[1], ARGV[3])
return 1
"""
)

FILL = (
    _PUT
    + """
-- KEYS: rows, fillings; ARGV: token, then field and value of each row
if redis.call('HGET', KEYS[2], KEYS[1]) ~= ARGV[1] then return -1 end
local key = fill_key(KEYS[1], ARGV[1])
local written = 0
for i = 2, #ARGV, 2 do written = written + put(key, ARGV[i], ARGV[i + 1]) end
return written
"""
)

FINISH = (
    _PUT
    + """
-- KEYS: rows, fillings, cursors; ARGV: token, cursor
if redis.call('HGET', KEYS[2], KEYS[1]) ~= ARGV[1] then return -1 end
local key = fill_key(KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], KEYS[1])
redis.call('HSET', KEYS[3], KEYS[1], ARGV[2])
if redis.call('EXISTS', KEYS[1]) == 1 then
  -- Renaming onto a large hash would stop the server while it is freed.
  redis.call('RENAME', KEYS[1], key .. ':old')
  redis.call('UNLINK', key .. ':old')
end
if redis.call('EXISTS', key) == 1 then redis.call('RENAME', key, KEYS[1]) end
return 1
"""
)

MOVE = """
-- KEYS: rows, cursors; ARGV: the cursor that is expected, "" for none, and the new one
if (redis.call('HGET', KEYS[2], KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[2], KEYS[1], ARGV[2])
return 1
"""

DROP = (
    _PUT
    + """
-- KEYS: rows, fillings, views, cursors
local token = redis.call('HGET', KEYS[2], KEYS[1])
if token then redis.call('UNLINK', fill_key(KEYS[1], token)) end
redis.call('UNLINK', KEYS[1])
redis.call('HDEL', KEYS[2], KEYS[1])
redis.call('SREM', KEYS[3], KEYS[1])
redis.call('HDEL', KEYS[4], KEYS[1])
return 1
"""
)

CLEAR = (
    _PUT
    + """
-- KEYS: fillings, layouts, views, cursors
for _, rows in ipairs(redis.call('SMEMBERS', KEYS[3])) do
  local token = redis.call('HGET', KEYS[1], rows)
  if token then redis.call('UNLINK', fill_key(rows, token)) end
  redis.call('UNLINK', rows)
end
redis.call('UNLINK', KEYS[1], KEYS[2], KEYS[3], KEYS[4])
return 1
"""
)
