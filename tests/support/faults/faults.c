/* Makes the n-th call on files of a folder fail, or ends the process before it: for tests.
 *
 * Preloaded (LD_PRELOAD), it stands before the C library's calls. Until it is armed, by `faults_arm`
 * or by FAULTS_* variables at the start, it passes them on. A call is of a kind ("write", "rename",
 * ...) and counts if its kind is asked for and its path, or that of its descriptor, begins with one
 * of the prefixes. Writes to mapped memory are no calls and are not seen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PATH (2 * PATH_MAX)
#define MAX_PREFIXES 8

static char prefixes[MAX_PREFIXES][PATH_MAX];
static int num_prefixes;
static char kinds[256];
static atomic_long count;
static long at;          /* the call that fails; 0: none does */
static int error_number; /* what it fails with; 0: the process is killed before it */
static int lasting;      /* whether all that follow fail too, as on a disk that is full */
static int halved;       /* whether the call itself, a write, writes a half, and the next fail */
static int log_to = -1;
static long clock_jump;  /* seconds that the wall clock goes back at the `jumps_at`-th look at it */
static long jumps_at;
static atomic_long looks;

static void copy(char *to, const char *from, size_t size) {
  strncpy(to, from, size - 1);
  to[size - 1] = 0;
}

/* `under` has a prefix in each line, `which` kinds between commas, each with a comma behind it. */
void faults_arm(const char *under, const char *which, long number, int how, int lasts, int half,
                const char *log) {
  at = 0;
  num_prefixes = 0;
  for (const char *line = under; *line && num_prefixes < MAX_PREFIXES;) {
    size_t length = strcspn(line, "\n");
    if (length > 0 && length < PATH_MAX) {
      memcpy(prefixes[num_prefixes], line, length);
      prefixes[num_prefixes++][length] = 0;
    }
    line += length + (line[length] == '\n');
  }
  copy(kinds, which, sizeof kinds);
  if (log && *log)
    log_to = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  atomic_store(&count, 0);
  error_number = how;
  lasting = lasts;
  halved = half;
  at = number;
}

void faults_turn_clock_back(long seconds, long number) {
  atomic_store(&looks, 0);
  jumps_at = number;
  clock_jump = seconds;
}

long faults_count(void) { return atomic_load(&count); }

__attribute__((constructor)) static void from_environment(void) {
  const char *under = getenv("FAULTS_UNDER"), *which = getenv("FAULTS_KINDS");
  const char *number = getenv("FAULTS_AT"), *how = getenv("FAULTS_ERRNO");
  if (under && which && number)
    faults_arm(under, which, atol(number), how ? atoi(how) : 0, getenv("FAULTS_LASTING") != NULL,
               getenv("FAULTS_HALF") != NULL, getenv("FAULTS_LOG"));
}

static int is_asked_for(const char *kind) {
  char name[32];
  snprintf(name, sizeof name, "%s,", kind);
  const char *found = strstr(kinds, name);
  return found && (found == kinds || found[-1] == ',');
}

static int is_under(const char *path) {
  for (int i = 0; i < num_prefixes; i++)
    if (strncmp(path, prefixes[i], strlen(prefixes[i])) == 0) return 1;
  return 0;
}

/* The path of a descriptor; empty if it has none. */
static void path_of(int descriptor, char *path) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, PATH_MAX - 1);
  path[length > 0 ? length : 0] = 0;
}

static void path_at(int folder, const char *name, char *path) {
  if (!name) name = "";
  if (*name == '/') {
    copy(path, name, PATH);
    return;
  }
  if (folder == AT_FDCWD) {
    if (!getcwd(path, PATH_MAX)) *path = 0;
  } else {
    path_of(folder, path);
  }
  size_t length = strlen(path);
  snprintf(path + length, PATH - length, "/%s", name);
}

enum { GO_ON = 0, HALF = -1 }; /* or the error number to fail with */

static int look(const char *kind, const char *path) {
  if (!num_prefixes || !is_asked_for(kind) || !is_under(path)) return GO_ON;
  long number = atomic_fetch_add(&count, 1) + 1;
  if (log_to >= 0) {
    char line[PATH + 64];
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\n", number, kind, path);
    syscall(SYS_write, log_to, line, (size_t)length);
  }
  if (!at || number < at) return GO_ON;
  if (number == at && !error_number) syscall(SYS_kill, getpid(), SIGKILL);
  if (number == at && halved) return strcmp(kind, "write") ? error_number : HALF;
  if (number == at || lasting || (halved && number == at + 1)) return error_number;
  return GO_ON;
}

static int look_at(const char *kind, int folder, const char *name) {
  if (!num_prefixes || !is_asked_for(kind)) return GO_ON;
  char path[PATH];
  path_at(folder, name, path);
  return look(kind, path);
}

static int look_through(const char *kind, int descriptor) {
  if (!num_prefixes || !is_asked_for(kind)) return GO_ON;
  int before = errno;
  char path[PATH];
  path_of(descriptor, path);
  errno = before;
  return look(kind, path);
}

#define REAL(name)                                    \
  static __typeof__(&name) real;                      \
  if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, #name)

#define FAIL_IF(verdict)             \
  do {                               \
    int refusal = (verdict);         \
    if (refusal) {                   \
      errno = refusal;               \
      return -1;                     \
    }                                \
  } while (0)

/* Opening. */

static int opens_to_write(int flags) { return flags & (O_WRONLY | O_RDWR | O_CREAT); }

static const char *kind_of_open(int flags) {
  if ((flags & O_TMPFILE) == O_TMPFILE) return "create";
  return opens_to_write(flags) ? "create" : "open";
}

#define MODE                                          \
  mode_t mode = 0;                                    \
  if (flags & (O_CREAT | __O_TMPFILE)) {              \
    va_list rest;                                     \
    va_start(rest, flags);                            \
    mode = va_arg(rest, mode_t);                      \
    va_end(rest);                                     \
  }

#define OPEN(name)                                                \
  int name(const char *path, int flags, ...) {                    \
    REAL(name);                                                   \
    MODE FAIL_IF(look_at(kind_of_open(flags), AT_FDCWD, path));   \
    return real(path, flags, mode);                               \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                              \
  int name(int folder, const char *path, int flags, ...) {        \
    REAL(name);                                                   \
    MODE FAIL_IF(look_at(kind_of_open(flags), folder, path));     \
    return real(folder, path, flags, mode);                       \
  }
OPENAT(openat)
OPENAT(openat64)

int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __openat_2(int folder, const char *path, int flags) { return openat(folder, path, flags); }
int __openat64_2(int folder, const char *path, int flags) { return openat64(folder, path, flags); }

int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) {
  return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

#define FOPEN(name)                                                         \
  FILE *name(const char *path, const char *mode) {                          \
    REAL(name);                                                             \
    int failed = look_at(strpbrk(mode, "wa+") ? "create" : "open", AT_FDCWD, path); \
    if (failed) {                                                           \
      errno = failed;                                                       \
      return NULL;                                                          \
    }                                                                       \
    return real(path, mode);                                                \
  }
FOPEN(fopen)
FOPEN(fopen64)

/* Reading and writing. */

#define READ(name, parameters, arguments)     \
  ssize_t name parameters {                   \
    REAL(name);                               \
    FAIL_IF(look_through("read", handle));    \
    return real arguments;                    \
  }
READ(read, (int handle, void *to, size_t size), (handle, to, size))
READ(pread, (int handle, void *to, size_t size, off_t from), (handle, to, size, from))
READ(pread64, (int handle, void *to, size_t size, off64_t from), (handle, to, size, from))
READ(readv, (int handle, const struct iovec *to, int parts), (handle, to, parts))
READ(preadv, (int handle, const struct iovec *to, int parts, off_t from),
     (handle, to, parts, from))
READ(preadv64, (int handle, const struct iovec *to, int parts, off64_t from),
     (handle, to, parts, from))

ssize_t __read_chk(int handle, void *to, size_t size, size_t room) {
  (void)room;
  return read(handle, to, size);
}
ssize_t __pread_chk(int handle, void *to, size_t size, off_t from, size_t room) {
  (void)room;
  return pread(handle, to, size, from);
}
ssize_t __pread64_chk(int handle, void *to, size_t size, off64_t from, size_t room) {
  (void)room;
  return pread64(handle, to, size, from);
}

#define WRITE(name, parameters, arguments, fewer)            \
  ssize_t name parameters {                                  \
    REAL(name);                                              \
    int verdict = look_through("write", handle);             \
    if (verdict == HALF && size > 1) return real fewer;      \
    FAIL_IF(verdict == HALF ? error_number : verdict);       \
    return real arguments;                                   \
  }
WRITE(write, (int handle, const void *from, size_t size), (handle, from, size),
      (handle, from, size / 2))
WRITE(pwrite, (int handle, const void *from, size_t size, off_t to), (handle, from, size, to),
      (handle, from, size / 2, to))
WRITE(pwrite64, (int handle, const void *from, size_t size, off64_t to), (handle, from, size, to),
      (handle, from, size / 2, to))
WRITE(writev, (int handle, const struct iovec *from, int size), (handle, from, size),
      (handle, from, size / 2))
WRITE(pwritev, (int handle, const struct iovec *from, int size, off_t to),
      (handle, from, size, to), (handle, from, size / 2, to))
WRITE(pwritev64, (int handle, const struct iovec *from, int size, off64_t to),
      (handle, from, size, to), (handle, from, size / 2, to))

#define MOVE(name, parameters, arguments)                    \
  ssize_t name parameters {                                  \
    REAL(name);                                              \
    int verdict = look_through("write", handle);             \
    FAIL_IF(verdict == HALF ? error_number : verdict);       \
    return real arguments;                                   \
  }
#include <sys/sendfile.h>
MOVE(sendfile, (int handle, int from, off_t *start, size_t size), (handle, from, start, size))
MOVE(sendfile64, (int handle, int from, off64_t *start, size_t size), (handle, from, start, size))
MOVE(copy_file_range,
     (int from, off64_t *start, int handle, off64_t *to, size_t size, unsigned int flags),
     (from, start, handle, to, size, flags))

/* Everything else: what it does, its kind, where. */

#define ON_DESCRIPTOR(name, kind, parameters, arguments) \
  int name parameters {                                  \
    REAL(name);                                          \
    FAIL_IF(look_through(kind, handle));                 \
    return real arguments;                               \
  }
ON_DESCRIPTOR(fsync, "sync", (int handle), (handle))
ON_DESCRIPTOR(fdatasync, "sync", (int handle), (handle))
ON_DESCRIPTOR(ftruncate, "truncate", (int handle, off_t size), (handle, size))
ON_DESCRIPTOR(ftruncate64, "truncate", (int handle, off64_t size), (handle, size))
ON_DESCRIPTOR(flock, "lock", (int handle, int how), (handle, how))
ON_DESCRIPTOR(fchmod, "mode", (int handle, mode_t mode), (handle, mode))

int posix_fallocate(int handle, off_t from, off_t size) {
  REAL(posix_fallocate);
  int failed = look_through("truncate", handle);
  return failed ? failed : real(handle, from, size);
}
int posix_fallocate64(int handle, off64_t from, off64_t size) {
  REAL(posix_fallocate64);
  int failed = look_through("truncate", handle);
  return failed ? failed : real(handle, from, size);
}

/* What network file systems keep for last, of what was written: the descriptor is closed still. */
int close(int handle) {
  REAL(close);
  int failed = GO_ON;
  if (num_prefixes && (fcntl(handle, F_GETFL) & O_ACCMODE) != O_RDONLY)
    failed = look_through("close", handle);
  int code = real(handle);
  FAIL_IF(failed);
  return code;
}

/* Only memory that is read from a file: a write to it could not be refused either. */
#define MAP(name, offset)                                                                    \
  void *name(void *where, size_t size, int how, int flags, int handle, offset from) {        \
    REAL(name);                                                                              \
    int failed = handle >= 0 ? look_through("map", handle) : GO_ON;                          \
    if (failed) {                                                                            \
      errno = failed;                                                                        \
      return MAP_FAILED;                                                                     \
    }                                                                                        \
    return real(where, size, how, flags, handle, from);                                      \
  }
MAP(mmap, off_t)
MAP(mmap64, off64_t)

#define ON_PATH(name, kind, folder, path, parameters, arguments) \
  int name parameters {                                          \
    REAL(name);                                                  \
    FAIL_IF(look_at(kind, folder, path));                        \
    return real arguments;                                       \
  }
ON_PATH(rename, "rename", AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(renameat, "rename", there, to, (int here, const char *from, int there, const char *to),
        (here, from, there, to))
ON_PATH(renameat2, "rename", there, to,
        (int here, const char *from, int there, const char *to, unsigned int flags),
        (here, from, there, to, flags))
ON_PATH(link, "link", AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(linkat, "link", there, to,
        (int here, const char *from, int there, const char *to, int flags),
        (here, from, there, to, flags))
ON_PATH(symlink, "link", AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(unlink, "unlink", AT_FDCWD, path, (const char *path), (path))
ON_PATH(unlinkat, "unlink", folder, path, (int folder, const char *path, int flags),
        (folder, path, flags))
ON_PATH(rmdir, "unlink", AT_FDCWD, path, (const char *path), (path))
ON_PATH(remove, "unlink", AT_FDCWD, path, (const char *path), (path))
ON_PATH(mkdir, "mkdir", AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(mkdirat, "mkdir", folder, path, (int folder, const char *path, mode_t mode),
        (folder, path, mode))
ON_PATH(chmod, "mode", AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(fchmodat, "mode", folder, path, (int folder, const char *path, mode_t mode, int flags),
        (folder, path, mode, flags))

/* The wall clock. */

int clock_gettime(clockid_t which, struct timespec *time) {
  REAL(clock_gettime);
  int code = real(which, time);
  if (clock_jump && which == CLOCK_REALTIME && atomic_fetch_add(&looks, 1) + 1 >= jumps_at)
    time->tv_sec -= clock_jump;
  return code;
}
