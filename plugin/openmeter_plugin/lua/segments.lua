-- Kong segments: the files in which a worker of nginx hands its records over, and the counters of records that it
-- could not write. docs/lua-plugin.md describes them for readers.
--
-- A worker holds an exclusive flock on the segment that it appends to, and moves on to a new one by size and age. A
-- free lock means that it has moved on or died; the kernel releases the lock, in any container. Nothing waits: there is
-- no timer, no fsync, no socket, and a segment that cannot be created is tried again at most ten times a second.
local generated = require "kong.plugins.openmeter.generated"
local bit = require "bit"
local cjson = require "cjson.safe"
local ffi = require "ffi"
local random = require("resty.random").bytes
local to_hex = require("resty.string").to_hex

local C, kong, ngx, ipairs, pcall, setmetatable, tonumber = ffi.C, kong, ngx, ipairs, pcall, setmetatable, tonumber
local copy, format, tohex = ffi.copy, string.format, bit.tohex

-- Under other names: another module may have declared these functions differently.
ffi.cdef [[
int openmeter_open(const char *path, int flags, unsigned int mode) __asm__("open");
int openmeter_close(int fd) __asm__("close");
intptr_t openmeter_write(int fd, const void *data, size_t size) __asm__("write");
intptr_t openmeter_pwrite(int fd, const void *data, size_t size, int64_t offset) __asm__("pwrite64");
int openmeter_ftruncate(int fd, int64_t size) __asm__("ftruncate64");
int openmeter_flock(int fd, int operation) __asm__("flock");
int openmeter_rename(const char *from, const char *to) __asm__("rename");
int openmeter_unlink(const char *path) __asm__("unlink");
int openmeter_access(const char *path, int mode) __asm__("access");
int openmeter_utimes(const char *path, const void *times) __asm__("utimes");
int openmeter_mkdir(const char *path, unsigned int mode) __asm__("mkdir");
int openmeter_chmod(const char *path, unsigned int mode) __asm__("chmod");
char *openmeter_strerror(int number) __asm__("strerror");
]]

-- Linux on x86-64 and ARM64 has these in common. O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, and O_APPEND
local CREATE, APPEND = 0x800c1, 0x400
local LOCK_EX_NB = 6
local ENOENT = 2
local MODE = 416 -- 0640
local FOLDER_MODE = 1528 -- 02770: files inherit the group

local MAX_BYTES = 1024 * 1024
local MAX_AGE = 1 -- second
local RETRY = 0.1
local LOG_INTERVAL = 60
local LOST_SIZE, MAGIC_AT, MAGIC = 4096, 1024, "openmeter-lost-1"

-- A line begins with the checksum of the rest.
local HEAD = "00000000 "

local M = { HEAD = HEAD, NO_FOLDER = 0, DISK_FULL = 1, READ_ONLY = 2, WRITE_FAILED = 3, INTERNAL_ERROR = 5 }
local NAMES =
  { [0] = "no_folder", "disk_full", "read_only", "write_failed", "too_large", "internal_error" }
local CAUSES = {
  [2] = M.NO_FOLDER, -- ENOENT
  [20] = M.NO_FOLDER, -- ENOTDIR
  [28] = M.DISK_FULL, -- ENOSPC
  [122] = M.DISK_FULL, -- EDQUOT
  [30] = M.READ_ONLY, -- EROFS
  [13] = M.READ_ONLY, -- EACCES
  [1] = M.READ_ONLY, -- EPERM
}

-- The checksum of a line: zlib's, which nginx is linked with (0.2 us for 720 bytes, ngx.crc32_long 1.4), if it is visible.
ffi.cdef [[
unsigned int openmeter_crc32(unsigned long start, const unsigned char *data, unsigned int size) __asm__("crc32");
]]
local has_zlib, crc32 = pcall(function()
  return C.openmeter_crc32
end)
if not has_zlib then
  crc32 = function(_, data, size)
    return ngx.crc32_long(ffi.string(data, size))
  end
end

local function line_of(payload)
  return format("%s %s\n", tohex(crc32(0, ffi.cast("const uint8_t *", payload), #payload)), payload)
end

local Segments = {}
Segments.__index = Segments

-- Return the segments of this worker. Its name is unlike that of any other worker, in other containers and later.
function M.new(folder)
  local worker = format("%d-%.0f-%s", ngx.worker.pid(), ngx.now() * 1000, to_hex(random(8, true)))
  return setmetatable({
    folder = folder,
    worker = worker,
    fd = -1,
    number = 0,
    size = 0,
    records = 0,
    opened = 0,
    retry = 0,
    cause = M.NO_FOLDER,
    fault = "",
    lost = ffi.new "uint64_t[16]",
    lost_fd = -1,
    lost_in_log = 0,
    logged = -LOG_INTERVAL,
  }, Segments)
end

-- Remember why the last call failed. Returns false.
function Segments:failed()
  local number = ffi.errno()
  self.cause = CAUSES[number] or M.WRITE_FAILED
  self.fault = ffi.string(C.openmeter_strerror(number))
  return false
end

function Segments:make_folder()
  for _, path in ipairs { self.folder, self.folder .. "/instances" } do
    if C.openmeter_mkdir(path, FOLDER_MODE) == 0 then
      C.openmeter_chmod(path, FOLDER_MODE) -- the umask does not apply to chmod
    end
  end
end

-- Create a file with this content and lock under a name that readers ignore, then give it its name: a reader that
-- found it before it was locked would take it for the file of a dead worker. Returns a descriptor, or nil.
function Segments:create(name, flags, content, locked)
  local path = self.folder .. "/" .. name
  local hidden = path .. "." .. self.worker .. ".tmp"
  local fd = C.openmeter_open(hidden, CREATE + flags, MODE)
  if fd < 0 then
    if ffi.errno() == ENOENT then
      self:make_folder()
    else
      C.openmeter_unlink(hidden) -- of an attempt that could neither name nor remove it
    end
    fd = C.openmeter_open(hidden, CREATE + flags, MODE)
  end
  if fd < 0 then
    return self:failed() or nil
  end
  local good = (not locked or C.openmeter_flock(fd, LOCK_EX_NB) == 0)
    and C.openmeter_write(fd, content, #content) == #content
    and C.openmeter_rename(hidden, path) == 0
  if not good then
    self:failed()
    C.openmeter_unlink(hidden)
    C.openmeter_close(fd)
    return nil
  end
  return fd
end

-- Lost records

function Segments:lost_name()
  return self.worker .. ".lost"
end

function Segments:open_lost()
  local content = ("\0"):rep(MAGIC_AT) .. MAGIC
  content = content .. ("\0"):rep(LOST_SIZE - #content)
  self.lost_fd = self:create(self:lost_name(), 0, content, true) or -1
  self:save_lost()
end

function Segments:save_lost()
  if self.lost_fd >= 0 then
    -- Not mapped into memory: on a full disk, a store into a mapped page can be a SIGBUS, which ends the worker.
    C.openmeter_pwrite(self.lost_fd, self.lost, ffi.sizeof(self.lost), 0)
  end
end

-- Count records that are not handed over, durably if the folder allows.
function Segments:lose(cause, fault, count, now)
  self.lost[cause] = self.lost[cause] + (count or 1)
  self:save_lost()
  self.lost_in_log = self.lost_in_log + (count or 1)
  now = now or ngx.now()
  if now - self.logged >= LOG_INTERVAL then
    kong.log.err("requests that were answered, but could not be handed over for metering: ", self.lost_in_log,
      " (", NAMES[cause], ": ", fault, ") in ", self.folder, "; they are counted as lost")
    self.logged, self.lost_in_log = now, 0
  end
end

-- Segments

function Segments:close(now)
  if self.fd < 0 then
    return
  end
  if self.records > 0 and C.openmeter_access(self:path(), 0) ~= 0 then
    -- The file was deleted although it was locked; at most, all records in it are lost.
    self:lose(M.NO_FOLDER, "a segment in use was deleted", self.records, now)
  end
  C.openmeter_close(self.fd)
  self.fd = -1
end

function Segments:path()
  return format("%s/%s-%06d.segment", self.folder, self.worker, self.number)
end

function Segments:open(now)
  if now < self.retry and now > self.retry - 60 then -- unless the clock was set back
    return false
  end
  self.number = self.number + 1
  local head = cjson.encode {
    format = "openmeter-kong-segment",
    version = 1,
    worker = self.worker,
    kong = kong.version,
    plugin = generated.version,
    created = now * 1000,
  }
  local line = line_of(head)
  local fd = self:create(format("%s-%06d.segment", self.worker, self.number), APPEND, line, true)
  if not fd then
    self.number = self.number - 1
    self.retry = now + RETRY
    return false
  end
  self.fd, self.size, self.records, self.opened = fd, #line, 0, now
  if self.lost_fd >= 0 and C.openmeter_access(self.folder .. "/" .. self:lost_name(), 0) ~= 0 then
    C.openmeter_close(self.lost_fd) -- deleted, with its folder mostly; the next file has all counts again
    self.lost_fd = -1
  end
  if self.lost_fd < 0 then
    self:open_lost()
  end
  return true
end

-- Write an instance's file. The time of the newest one decides which token of a destination is in use.
function Segments:describe(instance, now)
  local payload = format('{"format":"openmeter-kong-instance","version":1,"id":"%s","created":%.0f,"config":%s}',
    instance.id, now * 1000, instance.text)
  local fd = self:create(format("instances/%s.json", instance.id), 0, line_of(payload), false)
  if fd then
    C.openmeter_close(fd)
  end
  return fd ~= nil
end

-- Return whether the reader knows an instance, or write its file. Touched, so that the reader does not take it for
-- unused; not by its owner, this may be refused.
function Segments:know(instance, now)
  local path = format("%s/instances/%s.json", self.folder, instance.id)
  return C.openmeter_utimes(path, nil) == 0 or ffi.errno() ~= ENOENT or self:describe(instance, now)
end

-- Append the line in a buffer, whose checksum is not there yet, or count it as lost. No tail call here: LuaJIT does not
-- compile a function that ends with one, and then each call of C costs a microsecond or more.
function Segments:append(buf, instance, now)
  local age = now - self.opened
  local size = self.size + #buf
  if self.fd >= 0 and (size > MAX_BYTES or age >= MAX_AGE or age < 0) then
    self:close(now)
  end
  if self.fd < 0 then
    if not self:open(now) then
      self:lose(self.cause, self.fault, 1, now)
      return
    end
    size = self.size + #buf
  end
  -- Once in each segment: the reader may have deleted an instance that no segment named.
  if instance.segment ~= self.number then
    instance.segment = self:know(instance, now) and self.number or nil
  end
  local line, length = buf:ref()
  copy(line, tohex(crc32(0, line + #HEAD, length - #HEAD - 1)), 8)
  local written = tonumber(C.openmeter_write(self.fd, line, length))
  if written == length then
    self.size = size
    self.records = self.records + 1
  else
    self:undo(written, now)
  end
end

-- Leave no part of a line that could not be written, and count it as lost.
function Segments:undo(written, now)
  if written < 0 then
    self:failed()
  else
    self.cause, self.fault = M.DISK_FULL, "the line was written in part"
    if C.openmeter_ftruncate(self.fd, self.size) ~= 0 then
      -- The reader will count the torn line.
      C.openmeter_close(self.fd)
      self.fd = -1
      return
    end
  end
  self:lose(self.cause, self.fault, 1, now)
end

return M
