/* Services that generated CPU code asks of its host process: run a parallel loop, lend scratch memory.
 *
 * TVM lowers a parallel loop to a call through `__TVMBackendParallelLaunch` and a buffer to calls through
 * `__TVMBackendAllocWorkspace` / `__TVMBackendFreeWorkspace`: three pointers inside the object, null unless
 * TVM's own runtime fills them. This file is linked into every CPU object and defines them, so the object
 * needs no TVM at run time. The link step keeps the three names local, so no loader can replace them.
 *
 * Threads: when the process has an OpenMP runtime (torch brings one) its team is used, because two pools
 * on the same cores would fight; otherwise, and in a forked child (where that team is gone), a small pool
 * of this file is used, whose workers spin for a moment and then sleep.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

#define MAX_THREADS 256
#define CLOSED 0x7fffffffu /* a task index no launch reaches */
#define SPIN_ROUNDS 4096 /* about 50 us of pauses before a worker sleeps */

typedef struct {
  void *sync_handle;
  int32_t num_task;
} task_env;
typedef int (*task_function)(int task_id, task_env *env, void *data);

static atomic_int num_threads = 1;

static inline void relax_cpu(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

/* ---- scratch memory: a few blocks kept per thread, freed when the thread ends ---- */

#define KEPT_BLOCKS 4
#define KEPT_BYTES ((size_t)32 << 20) /* larger blocks go straight back to the system */

typedef struct {
  void *address;
  size_t size;
  int used;
} block;
typedef struct {
  block blocks[KEPT_BLOCKS];
} block_cache;

static pthread_key_t cache_key;
static pthread_once_t cache_once = PTHREAD_ONCE_INIT;
static int cache_ready = 0;

static void free_cache(void *pointer) {
  block_cache *cache = pointer;
  for (int i = 0; i < KEPT_BLOCKS; ++i) free(cache->blocks[i].address);
  free(cache);
}

static void make_cache_key(void) { cache_ready = pthread_key_create(&cache_key, free_cache) == 0; }

static block_cache *thread_cache(void) {
  pthread_once(&cache_once, make_cache_key);
  if (!cache_ready) return NULL;
  block_cache *cache = pthread_getspecific(cache_key);
  if (!cache && (cache = calloc(1, sizeof(block_cache)))) {
    if (pthread_setspecific(cache_key, cache)) {
      free(cache);
      return NULL;
    }
  }
  return cache;
}

static void *alloc_workspace(int device_type, int device_id, uint64_t nbytes, int code_hint, int bits_hint) {
  (void)device_type, (void)device_id, (void)code_hint, (void)bits_hint;
  size_t size = ((size_t)nbytes + 4095) & ~(size_t)4095;
  if (size < nbytes) return NULL;
  if (!size) size = 4096;
  block_cache *cache = size <= KEPT_BYTES ? thread_cache() : NULL;
  block *spare = NULL; /* the smallest unused block, replaced when none is large enough */
  for (int i = 0; cache && i < KEPT_BLOCKS; ++i) {
    block *b = &cache->blocks[i];
    if (b->used) continue;
    if (b->size >= size) {
      b->used = 1;
      return b->address;
    }
    if (!spare || b->size < spare->size) spare = b;
  }
  void *address = NULL;
  if (posix_memalign(&address, 64, size)) return NULL;
  if (spare) {
    free(spare->address);
    *spare = (block){address, size, 1};
  }
  return address;
}

static int free_workspace(int device_type, int device_id, void *address) {
  (void)device_type, (void)device_id;
  block_cache *cache = cache_ready ? pthread_getspecific(cache_key) : NULL;
  for (int i = 0; cache && i < KEPT_BLOCKS; ++i) {
    if (cache->blocks[i].address == address && cache->blocks[i].used) {
      cache->blocks[i].used = 0;
      return 0;
    }
  }
  free(address);
  return 0;
}

/* ---- the team of the process's OpenMP runtime ---- */

typedef void (*gomp_parallel_function)(void (*)(void *), void *, unsigned, unsigned);
static gomp_parallel_function gomp_parallel = NULL;

typedef struct {
  task_function function;
  void *data;
  task_env env;
  atomic_int next, failed;
} omp_job;

static void omp_member(void *pointer) { /* takes tasks until none is left: any team size will do */
  omp_job *job = pointer;
  for (int i; (i = atomic_fetch_add(&job->next, 1)) < job->env.num_task;)
    if (job->function(i, &job->env, job->data)) atomic_store(&job->failed, 1);
}

/* ---- own pool ----
 * `ticket` holds the launch number (high half) and the next task (low half). A worker reads the launch's
 * fields and then takes a task by compare-and-swap; success proves the launch had not ended meanwhile. */

static pthread_mutex_t launch_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_mutex_t sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
static int workers = 0; /* guarded by launch_lock */
static atomic_int sleepers = 0, task_count = 0, done = 0, failed = 0;
static _Atomic(task_function) pool_function;
static _Atomic(void *) pool_data;
static _Atomic uint64_t ticket = 0;

static int run_one_task(void) { /* 0 when the current launch has no task left */
  uint64_t t = atomic_load(&ticket);
  for (;;) {
    task_function function = atomic_load(&pool_function);
    void *data = atomic_load(&pool_data);
    task_env env = {NULL, atomic_load(&task_count)};
    if ((int)(uint32_t)t >= env.num_task) return 0;
    if (!atomic_compare_exchange_weak(&ticket, &t, t + 1)) continue;
    if (function((int)(uint32_t)t, &env, data)) atomic_store(&failed, 1);
    atomic_fetch_add(&done, 1);
    return 1;
  }
}

static void *worker(void *unused) {
  (void)unused;
  uint32_t seen = 0;
  for (;;) {
    int spins = 0;
    while ((uint32_t)(atomic_load_explicit(&ticket, memory_order_acquire) >> 32) == seen) {
      if (++spins < SPIN_ROUNDS) {
        relax_cpu();
        continue;
      }
      pthread_mutex_lock(&sleep_lock);
      atomic_fetch_add(&sleepers, 1);
      while ((uint32_t)(atomic_load(&ticket) >> 32) == seen) pthread_cond_wait(&wake, &sleep_lock);
      atomic_fetch_sub(&sleepers, 1);
      pthread_mutex_unlock(&sleep_lock);
    }
    seen = (uint32_t)(atomic_load(&ticket) >> 32);
    while (run_one_task()) {
    }
  }
  return NULL;
}

static int run_here(task_function function, void *data, int tasks) {
  task_env env = {NULL, tasks};
  int status = 0;
  for (int i = 0; i < tasks; ++i) status |= function(i, &env, data);
  return status ? -1 : 0;
}

static int launch_in_pool(task_function function, void *data, int tasks) {
  if (pthread_mutex_trylock(&launch_lock)) return run_here(function, data, tasks); /* busy or nested */
  while (workers < tasks - 1) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, worker, NULL)) break;
    pthread_detach(thread);
    ++workers;
  }
  uint64_t launch = (atomic_load(&ticket) >> 32) + 1;
  atomic_store(&ticket, (launch - 1) << 32 | CLOSED); /* late workers find nothing while fields change */
  atomic_store(&pool_function, function);
  atomic_store(&pool_data, data);
  atomic_store(&done, 0);
  atomic_store(&failed, 0);
  atomic_store(&task_count, tasks);
  atomic_store(&ticket, launch << 32);
  if (atomic_load(&sleepers)) {
    pthread_mutex_lock(&sleep_lock);
    pthread_cond_broadcast(&wake);
    pthread_mutex_unlock(&sleep_lock);
  }
  while (run_one_task()) {
  }
  for (int spins = 0; atomic_load_explicit(&done, memory_order_acquire) < tasks; ++spins)
    spins < SPIN_ROUNDS ? relax_cpu() : (void)sched_yield();
  int status = atomic_load(&failed) ? -1 : 0;
  pthread_mutex_unlock(&launch_lock);
  return status;
}

static int parallel_launch(task_function function, void *data, int tasks) {
  if (tasks <= 0) tasks = atomic_load_explicit(&num_threads, memory_order_relaxed);
  if (tasks == 1) return run_here(function, data, 1);
  if (!gomp_parallel) return launch_in_pool(function, data, tasks);
  omp_job job = {function, data, {NULL, tasks}, 0, 0};
  gomp_parallel(omp_member, &job, (unsigned)tasks, 0);
  return atomic_load(&job.failed) ? -1 : 0;
}

static void after_fork_in_child(void) {
  pthread_mutex_init(&launch_lock, NULL);
  pthread_mutex_init(&sleep_lock, NULL);
  pthread_cond_init(&wake, NULL);
  workers = 0;
  atomic_store(&sleepers, 0);
  gomp_parallel = NULL;
}

__attribute__((constructor)) static void prepare(void) { pthread_atfork(NULL, NULL, after_fork_in_child); }

/* The pointers that generated code calls through. */
void *__TVMBackendParallelLaunch = (void *)parallel_launch;
void *__TVMBackendAllocWorkspace = (void *)alloc_workspace;
void *__TVMBackendFreeWorkspace = (void *)free_workspace;

/* Threads of every later parallel loop; returns the number in force. */
int liftc_set_num_threads(int count) {
  if (count >= 1) atomic_store(&num_threads, count < MAX_THREADS ? count : MAX_THREADS);
  return atomic_load(&num_threads);
}

/* use = 1: join the OpenMP runtime of the process if it has one. Returns 1 when it is in use. */
int liftc_use_openmp(int use) {
  void *symbol = use ? dlsym(RTLD_DEFAULT, "GOMP_parallel") : NULL;
  gomp_parallel = (gomp_parallel_function)symbol;
  return symbol != NULL;
}
