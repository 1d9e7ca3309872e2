/* Stand-in for libhccl.so: collectives between processes of one machine over shared memory.

   A communicator is one block of memory that all its ranks map:
       header | one slot of SLOT_BYTES a rank | one mailbox a pair (from, to)
   It is an unnamed file (memfd) of the rank that makes the root info; the others open it through
   that process's /proc entry. So there is nothing to unlink, whoever dies, and no limit of /dev/shm.

   A rank that never comes does not hang the others: whoever waits gives up with one line after
   NPU_SIM_HCCL_TIMEOUT seconds (60), and at once when the missing process is gone. Ranks that call
   different collectives, counts, types or operations are told so; real HCCL hangs or corrupts. */
#define _GNU_SOURCE
#include "error.h"

#include <fcntl.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { OK = 0, E_PARA = 1, E_MEMORY = 3, E_NOT_SUPPORT = 5, E_SYSCALL = 8, E_TIMEOUT = 9 };
enum { MOST_RANKS = 64, SLOT_BYTES = 1 << 20, MAIL_BYTES = 1 << 16 };

/* ---- types and reductions ------------------------------------------------------------------ */

typedef enum { INT8, INT16, INT32, FP16, FP32, INT64, UINT64, UINT8, UINT16, UINT32, FP64, BF16 } Type;
static const struct {
  const char *name;
  size_t bytes;
} TYPES[] = {
    {"int8", 1},   {"int16", 2}, {"int32", 4},  {"float16", 2}, {"float32", 4}, {"int64", 8},
    {"uint64", 8}, {"uint8", 1}, {"uint16", 2}, {"uint32", 4},  {"float64", 8}, {"bfloat16", 2},
};
static const int TYPE_COUNT = sizeof TYPES / sizeof TYPES[0];

typedef enum { SUM, PROD, MAX, MIN, OPERATION_COUNT } Operation;
static const char *OPERATIONS[] = {"sum", "prod", "max", "min"};

/* By hand: not every C compiler has _Float16. */
static float from_fp16(uint16_t half) {
  int exponent = half >> 10 & 31, fraction = half & 1023;
  float value = exponent == 31  ? (fraction ? NAN : INFINITY)
                : exponent == 0 ? ldexpf(fraction, -24)
                                : ldexpf(fraction + 1024, exponent - 25);
  return half & 0x8000 ? -value : value;
}

static uint16_t to_fp16(float value) {
  uint16_t sign = signbit(value) ? 0x8000 : 0;
  if (isnan(value)) return 0x7e00;
  value = fabsf(value);
  if (value >= 65520.0f) return sign | 0x7c00;
  int exponent;
  frexpf(value, &exponent); /* value = f * 2^exponent, 0.5 <= f < 1 */
  if (value == 0 || exponent < -13) exponent = -13;
  int fraction = (int)lrintf(ldexpf(value, 11 - exponent)); /* to nearest, ties to even */
  return sign | (((exponent + 13) << 10) + fraction);
}

static float from_bf16(uint16_t half) {
  uint32_t bits = (uint32_t)half << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static uint16_t to_bf16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

/* A NaN on either side wins max and min. */
#define REDUCE(a, b)                              \
  (operation == SUM    ? (a) + (b)                \
   : operation == PROD ? (a) * (b)                \
   : operation == MAX  ? ((a) > (b) || (a) != (a) ? (a) : (b)) \
                       : ((a) < (b) || (a) != (a) ? (a) : (b)))
#define REDUCE_AS(type)                                                                  \
  for (uint64_t i = 0; i < count; i++)                                                   \
    ((type *)into)[i] = REDUCE(((type *)into)[i], ((const type *)from)[i]);              \
  break;
#define REDUCE_HALF(kind)                                              \
  for (uint64_t i = 0; i < count; i++) {                               \
    float a = from_##kind(((uint16_t *)into)[i]);                      \
    float b = from_##kind(((const uint16_t *)from)[i]);                \
    ((uint16_t *)into)[i] = to_##kind(REDUCE(a, b));                   \
  }                                                                    \
  break;

static void reduce(void *into, const void *from, uint64_t count, Type type, Operation operation) {
  switch (type) {
    case INT8: REDUCE_AS(int8_t)
    case INT16: REDUCE_AS(int16_t)
    case INT32: REDUCE_AS(int32_t)
    case INT64: REDUCE_AS(int64_t)
    case FP32: REDUCE_AS(float)
    case FP16: REDUCE_HALF(fp16)
    case BF16: REDUCE_HALF(bf16)
    default: break; /* refused by check_reduction */
  }
}

/* The table of the documents for A2 and A3. */
static int check_reduction(const char *name, Type type, Operation operation) {
  int known = type == INT8 || type == INT16 || type == INT32 || type == INT64 || type == FP16 ||
              type == FP32 || type == BF16;
  if (!known || operation >= OPERATION_COUNT || (operation == PROD && (type == INT16 || type == BF16)))
    return npu_sim_error(E_NOT_SUPPORT, "%s does not reduce %s with %s", name,
                         (int)type < TYPE_COUNT ? TYPES[type].name : "this type",
                         operation < OPERATION_COUNT ? OPERATIONS[operation] : "this operation");
  return OK;
}

/* ---- the shared block ---------------------------------------------------------------------- */

/* What a rank says it is about to do. */
typedef struct {
  char name[24];
  uint64_t count;
  int type, operation, root;
} Call;

typedef struct {
  _Atomic int pid;
  _Atomic uint64_t arrived; /* barriers that this rank has come to */
  Call call;
} Rank;

/* One message at a time, in pieces: `sent` and `taken` count the pieces. */
typedef struct {
  _Atomic uint64_t sent, taken;
  uint64_t bytes;
  int type;
  char piece[MAIL_BYTES];
} Mailbox;

typedef struct {
  Rank *ranks;
  char *slots;
  Mailbox *mail;
  void *block;
  size_t block_bytes;
  uint32_t size, rank;
  int root_file;
} Communicator;

typedef struct {
  int pid, file, number;
} RootInfo; /* at the start of the 4108 bytes that torch_npu sends to the other ranks */

static Mailbox *mailbox(Communicator *c, uint32_t from, uint32_t to) {
  return &c->mail[from * c->size + to];
}

static char *slot(Communicator *c, uint32_t rank) { return c->slots + (size_t)rank * SLOT_BYTES; }

/* ---- waiting ------------------------------------------------------------------------------- */

typedef struct {
  double start, limit;
  unsigned turns;
} Wait;

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static Wait wait_begin(void) {
  const char *text = getenv("NPU_SIM_HCCL_TIMEOUT");
  return (Wait){now(), text && *text ? atof(text) : 60.0, 0};
}

/* A process that has ended but was not collected by its parent yet still has a /proc entry. */
static int process_is_gone(int pid) {
  char path[32], text[512];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  FILE *file = fopen(path, "r");
  if (!file) return 1;
  size_t length = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  text[length] = 0;
  const char *state = strrchr(text, ')');
  return !state || state[2] == 'Z' || state[2] == 'X';
}

/* Waits a little for another rank; an error when it is in vain. */
static int wait_turn(Communicator *c, Wait *wait, uint32_t missing, const char *name) {
  if (++wait->turns % 64) {
    usleep(wait->turns < 4096 ? 20 : 500);
    return OK;
  }
  int pid = c->ranks[missing].pid;
  if (pid && process_is_gone(pid))
    return npu_sim_error(E_TIMEOUT, "%s: rank %u of %u (process %d) is gone", name, missing,
                         c->size, pid);
  if (now() - wait->start > wait->limit)
    return npu_sim_error(E_TIMEOUT, "%s: rank %u of %u did not come within %g s", name, missing,
                         c->size, wait->limit);
  return OK;
}

/* Passes when every rank has come here. Each counts its own arrivals; nothing is ever reset. */
static int barrier(Communicator *c, const char *name) {
  uint64_t mine = atomic_fetch_add(&c->ranks[c->rank].arrived, 1) + 1;
  Wait wait = wait_begin();
  for (uint32_t other = 0; other < c->size; other++)
    while (atomic_load(&c->ranks[other].arrived) < mine) {
      int problem = wait_turn(c, &wait, other, name);
      /* It may have come and gone between the two looks. */
      if (problem && atomic_load(&c->ranks[other].arrived) < mine) return problem;
    }
  return OK;
}

/* ---- agreement ----------------------------------------------------------------------------- */

static void describe(char *text, size_t length, const Call *call) {
  int used = snprintf(text, length, "%s(count=%llu, %s", call->name,
                      (unsigned long long)call->count, TYPES[call->type].name);
  if (call->operation >= 0)
    used += snprintf(text + used, length - used, ", %s", OPERATIONS[call->operation]);
  if (call->root >= 0) used += snprintf(text + used, length - used, ", root=%d", call->root);
  snprintf(text + used, length - used, ")");
}

/* Every rank says what it calls, and all compare: an error on every rank if two differ. */
static int agree(Communicator *c, const char *name, uint64_t count, int type, int operation, int root) {
  if (type < 0 || type >= TYPE_COUNT)
    return npu_sim_error(E_NOT_SUPPORT, "%s: type %d is not one of A2 and A3", name, type);
  Call *mine = &c->ranks[c->rank].call;
  memset(mine, 0, sizeof *mine);
  snprintf(mine->name, sizeof mine->name, "%s", name);
  mine->count = count;
  mine->type = type;
  mine->operation = operation;
  mine->root = root;
  int problem = barrier(c, name);
  if (problem) return problem;
  int differing = -1;
  for (uint32_t rank = 1; rank < c->size && differing < 0; rank++)
    if (memcmp(&c->ranks[rank].call, &c->ranks[0].call, sizeof(Call))) differing = rank;
  char first[128], second[128];
  if (differing >= 0) {
    describe(first, sizeof first, &c->ranks[0].call);
    describe(second, sizeof second, &c->ranks[differing].call);
  }
  /* Nobody starts the next call before all have read this one. */
  if ((problem = barrier(c, name))) return problem;
  if (differing >= 0)
    return npu_sim_error(E_PARA, "ranks disagree: rank 0 called %s, rank %d called %s", first,
                         differing, second);
  return OK;
}

/* ---- collectives --------------------------------------------------------------------------- */

static uint64_t least(uint64_t a, uint64_t b) { return a < b ? a : b; }

/* Every collective goes in rounds: write the own slot, meet, read the others' slots, meet. */
#define FOR_EACH_ROUND(start, bytes, total) \
  for (uint64_t start = 0, bytes; (bytes = least((total) - start, SLOT_BYTES)) > 0; start += bytes)
#define MEET(c, name)                              \
  do {                                             \
    int problem_ = barrier(c, name);               \
    if (problem_) return problem_;                 \
  } while (0)

static int all_reduce(Communicator *c, const char *name, const char *send, char *receive,
                      uint64_t count, Type type, Operation operation) {
  FOR_EACH_ROUND(start, bytes, count * TYPES[type].bytes) {
    memcpy(slot(c, c->rank), send + start, bytes);
    MEET(c, name);
    memcpy(receive + start, slot(c, 0), bytes);
    for (uint32_t rank = 1; rank < c->size; rank++)
      reduce(receive + start, slot(c, rank), bytes / TYPES[type].bytes, type, operation);
    MEET(c, name);
  }
  return OK;
}

int HcclAllReduce(const void *send, void *receive, uint64_t count, int type, int operation, void *comm,
                  void *stream) {
  int problem = check_reduction("all_reduce", type, operation);
  if (!problem) problem = agree(comm, "all_reduce", count, type, operation, -1);
  return problem ? problem : all_reduce(comm, "all_reduce", send, receive, count, type, operation);
}

int HcclReduceScatter(const void *send, void *receive, uint64_t count, int type, int operation,
                      void *comm, void *stream) {
  Communicator *c = comm;
  const char *name = "reduce_scatter";
  int problem = check_reduction(name, type, operation);
  if (!problem) problem = agree(c, name, count, type, operation, -1);
  if (problem) return problem;
  uint64_t part = count * TYPES[type].bytes;
  char *all = malloc(part * c->size + 1);
  if (!all) return npu_sim_error(E_MEMORY, "%s: no memory", name);
  problem = all_reduce(c, name, send, all, count * c->size, type, operation);
  if (!problem) memcpy(receive, all + c->rank * part, part);
  free(all);
  return problem;
}

int HcclReduce(const void *send, void *receive, uint64_t count, int type, int operation, uint32_t root,
               void *comm, void *stream) {
  Communicator *c = comm;
  const char *name = "reduce";
  int problem = check_reduction(name, type, operation);
  if (!problem) problem = agree(c, name, count, type, operation, root);
  if (problem) return problem;
  uint64_t total = count * TYPES[type].bytes;
  char *result = malloc(total + 1);
  if (!result) return npu_sim_error(E_MEMORY, "%s: no memory", name);
  problem = all_reduce(c, name, send, result, count, type, operation);
  if (!problem && c->rank == root) memcpy(receive, result, total);
  free(result);
  return problem;
}

int HcclBroadcast(void *buffer, uint64_t count, int type, uint32_t root, void *comm, void *stream) {
  Communicator *c = comm;
  const char *name = "broadcast";
  int problem = agree(c, name, count, type, -1, root);
  if (problem) return problem;
  FOR_EACH_ROUND(start, bytes, count * TYPES[type].bytes) {
    if (c->rank == root) memcpy(slot(c, root), (char *)buffer + start, bytes);
    MEET(c, name);
    if (c->rank != root) memcpy((char *)buffer + start, slot(c, root), bytes);
    MEET(c, name);
  }
  return OK;
}

int HcclAllGather(const void *send, void *receive, uint64_t count, int type, void *comm, void *stream) {
  Communicator *c = comm;
  const char *name = "all_gather";
  int problem = agree(c, name, count, type, -1, -1);
  if (problem) return problem;
  uint64_t part = count * TYPES[type].bytes;
  FOR_EACH_ROUND(start, bytes, part) {
    memcpy(slot(c, c->rank), (const char *)send + start, bytes);
    MEET(c, name);
    for (uint32_t rank = 0; rank < c->size; rank++)
      memcpy((char *)receive + rank * part + start, slot(c, rank), bytes);
    MEET(c, name);
  }
  return OK;
}

int HcclScatter(const void *send, void *receive, uint64_t count, int type, uint32_t root, void *comm,
                void *stream) {
  Communicator *c = comm;
  const char *name = "scatter";
  int problem = agree(c, name, count, type, -1, root);
  if (problem) return problem;
  uint64_t part = count * TYPES[type].bytes;
  FOR_EACH_ROUND(start, bytes, part) {
    if (c->rank == root)
      for (uint32_t rank = 0; rank < c->size; rank++)
        memcpy(slot(c, rank), (const char *)send + rank * part + start, bytes);
    MEET(c, name);
    memcpy((char *)receive + start, slot(c, c->rank), bytes);
    MEET(c, name);
  }
  return OK;
}

int HcclBarrier(void *comm, void *stream) { return agree(comm, "barrier", 0, INT8, -1, -1); }

/* ---- point to point ------------------------------------------------------------------------ */

/* A message on its way, in one direction; `other` is the peer. */
typedef struct {
  int sending;
  uint32_t other;
  char *data;
  uint64_t bytes, done;
  int type, finished;
} Transfer;

/* Moves one piece if the peer is ready for it. */
static int transfer_step(Communicator *c, Transfer *t, int *moved) {
  Mailbox *box = t->sending ? mailbox(c, c->rank, t->other) : mailbox(c, t->other, c->rank);
  uint64_t sent = atomic_load(&box->sent), taken = atomic_load(&box->taken);
  if (t->sending ? sent != taken : sent == taken) return OK;
  if (t->sending) {
    box->bytes = t->bytes;
    box->type = t->type;
  } else if (box->bytes != t->bytes || box->type != t->type) {
    return npu_sim_error(E_PARA, "ranks disagree: rank %u sent %llu bytes of %s, rank %u receives %llu of %s",
                         t->other, (unsigned long long)box->bytes, TYPES[box->type].name, c->rank,
                         (unsigned long long)t->bytes, TYPES[t->type].name);
  }
  uint64_t piece = least(t->bytes - t->done, MAIL_BYTES);
  if (t->sending)
    memcpy(box->piece, t->data + t->done, piece);
  else
    memcpy(t->data + t->done, box->piece, piece);
  atomic_fetch_add(t->sending ? &box->sent : &box->taken, 1);
  t->done += piece;
  t->finished = t->done == t->bytes;
  *moved = 1;
  return OK;
}

/* All of them at once, so that no order of sends and receives can block. */
static int transfer_all(Communicator *c, const char *name, Transfer *list, uint32_t count) {
  Wait wait = wait_begin();
  for (uint32_t i = 0; i < count; i++)
    if (list[i].type < 0 || list[i].type >= TYPE_COUNT || list[i].other >= c->size)
      return npu_sim_error(E_PARA, "%s: type %d with rank %u", name, list[i].type, list[i].other);
  for (;;) {
    Transfer *open = NULL;
    int moved = 0;
    for (uint32_t i = 0; i < count; i++) {
      /* Messages between two ranks keep their order. */
      int behind = 0;
      for (uint32_t j = 0; j < i; j++)
        behind |= !list[j].finished && list[j].other == list[i].other && list[j].sending == list[i].sending;
      if (!list[i].finished && !behind) {
        int problem = transfer_step(c, &list[i], &moved);
        if (problem) return problem;
      }
      if (!list[i].finished && !open) open = &list[i];
    }
    if (!open) return OK;
    if (moved) {
      wait = wait_begin();
      continue;
    }
    int problem = wait_turn(c, &wait, open->other, name);
    if (problem) return problem;
  }
}

static Transfer transfer(int sending, uint32_t other, const void *data, uint64_t count, int type) {
  size_t bytes = type >= 0 && (int)type < TYPE_COUNT ? TYPES[type].bytes : 0;
  return (Transfer){sending, other, (char *)data, count * bytes, 0, type, 0};
}

int HcclSend(const void *data, uint64_t count, int type, uint32_t to, void *comm, void *stream) {
  Transfer one = transfer(1, to, data, count, type);
  return transfer_all(comm, "send", &one, 1);
}

int HcclRecv(void *data, uint64_t count, int type, uint32_t from, void *comm, void *stream) {
  Transfer one = transfer(0, from, data, count, type);
  return transfer_all(comm, "recv", &one, 1);
}

typedef struct {
  int kind; /* 0 send, 1 receive */
  void *data;
  uint64_t count;
  int type;
  uint32_t other;
} SendRecvItem;

int HcclBatchSendRecv(const SendRecvItem *items, uint32_t count, void *comm, void *stream) {
  Transfer *list = calloc(count + 1, sizeof *list);
  if (!list) return npu_sim_error(E_MEMORY, "batch_send_recv: no memory");
  for (uint32_t i = 0; i < count; i++)
    list[i] = transfer(items[i].kind == 0, items[i].other, items[i].data, items[i].count, items[i].type);
  int problem = transfer_all(comm, "batch_send_recv", list, count);
  free(list);
  return problem;
}

int HcclAlltoAllV(const void *send, const uint64_t *send_counts, const uint64_t *send_starts,
                  int send_type, void *receive, const uint64_t *receive_counts,
                  const uint64_t *receive_starts, int receive_type, void *comm, void *stream) {
  Communicator *c = comm;
  int problem = agree(c, "all_to_all", 0, send_type, -1, -1);
  if (problem) return problem;
  Transfer list[2 * MOST_RANKS];
  for (uint32_t rank = 0; rank < c->size; rank++) {
    size_t in = TYPES[send_type].bytes, out = TYPES[receive_type].bytes;
    list[2 * rank] = transfer(1, rank, (const char *)send + send_starts[rank] * in,
                              send_counts[rank], send_type);
    list[2 * rank + 1] = transfer(0, rank, (char *)receive + receive_starts[rank] * out,
                                  receive_counts[rank], receive_type);
  }
  return transfer_all(c, "all_to_all", list, 2 * c->size);
}

int HcclAlltoAll(const void *send, uint64_t send_count, int send_type, void *receive,
                 uint64_t receive_count, int receive_type, void *comm, void *stream) {
  Communicator *c = comm;
  uint64_t sends[MOST_RANKS], receives[MOST_RANKS], from[MOST_RANKS], to[MOST_RANKS];
  for (uint32_t rank = 0; rank < c->size; rank++) {
    sends[rank] = send_count, from[rank] = rank * send_count;
    receives[rank] = receive_count, to[rank] = rank * receive_count;
  }
  return HcclAlltoAllV(send, sends, from, send_type, receive, receives, to, receive_type, comm, stream);
}

/* ---- communicators ------------------------------------------------------------------------- */

int HcclGetRootInfo(RootInfo *info) {
  static _Atomic int number;
  memset(info, 0, 4108);
  info->file = memfd_create("npu_sim_hccl", MFD_CLOEXEC);
  if (info->file < 0) return npu_sim_error(E_SYSCALL, "no shared memory for a communicator");
  info->pid = getpid();
  info->number = number++;
  return OK;
}

int HcclCommInitRootInfo(uint32_t size, const RootInfo *info, uint32_t rank, void **out) {
  const char *name = "making the communicator";
  if (size < 1 || size > MOST_RANKS || rank >= size)
    return npu_sim_error(E_PARA, "%s: rank %u of %u, at most %d ranks", name, rank, size, MOST_RANKS);
  int mine = info->pid == getpid(), file = info->file;
  if (!mine) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", info->pid, info->file);
    file = open(path, O_RDWR | O_CLOEXEC);
  }
  size_t header = (sizeof(Rank) * size + 4095) / 4096 * 4096;
  size_t slots = header + (size_t)size * SLOT_BYTES;
  size_t total = slots + (size_t)size * size * sizeof(Mailbox);
  if (file < 0 || ftruncate(file, total))
    return npu_sim_error(E_SYSCALL, "%s: rank %u cannot open the memory of process %d", name, rank,
                         info->pid);
  char *block = mmap(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (!mine) close(file);
  Communicator *c = calloc(1, sizeof *c);
  if (block == MAP_FAILED || !c) return npu_sim_error(E_MEMORY, "%s: no memory", name);
  *c = (Communicator){(Rank *)block, block + header,
                      (Mailbox *)(block + slots), block, total, size, rank, mine ? file : -1};
  c->ranks[rank].pid = getpid();
  int problem = barrier(c, name);
  if (mine) close(file); /* everybody has it, or never will */
  if (problem) return problem;
  *out = c;
  return OK;
}

int HcclCommInitRootInfoConfig(uint32_t size, const RootInfo *info, uint32_t rank, const void *config,
                               void **out) {
  return HcclCommInitRootInfo(size, info, rank, out);
}

int HcclCommDestroy(void *comm) {
  Communicator *c = comm;
  munmap(c->block, c->block_bytes);
  free(c);
  return OK;
}

int HcclGetCommName(void *comm, char *name) {
  strcpy(name, "npu_sim");
  return OK;
}

int HcclGetCommAsyncError(void *comm, int *error) {
  *error = OK;
  return OK;
}

/* Whether reductions are deterministic: here they always are. */
int HcclSetConfig(int option, int value) { return OK; }

uint32_t HcclGetCommConfigCapability(void) { return 0; }

const char *HcclGetErrorString(int code) {
  switch (code) {
    case OK: return "success";
    case E_PARA: return "parameter error";
    case E_MEMORY: return "memory error";
    case E_NOT_SUPPORT: return "not support feature";
    case E_SYSCALL: return "call system interface error";
    case E_TIMEOUT: return "timeout";
    default: return "error";
  }
}
