/* Table noise (and masked noise, numbers of tensors, thin factors) made, multiplied and added in one pass over memory: the
   compiled back end of kernels/contract.py.

   Plain C99, no Python headers; kernels/native.py calls it with ctypes and hands over the codebook and the threads.
   The bits are those of kernels/reference.py. The loops are in native_loops.h.

   The arithmetic must round where the contract says: build with -ffp-contract=off and never with -ffast-math. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "native_types.h"

static const uint32_t BIT[32] = {1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,  1u << 7,
                                 1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13, 1u << 14, 1u << 15,
                                 1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20, 1u << 21, 1u << 22, 1u << 23,
                                 1u << 24, 1u << 25, 1u << 26, 1u << 27, 1u << 28, 1u << 29, 1u << 30, 1u << 31};

/* The codebook (kernels/codebook.py) in 8 KB, which stay in the first-level cache: whole rows would take 256. */
static int8_t base_rows[BASE][ROW] __attribute__((aligned(64))); /* times 32 */
static uint32_t walsh[ROW][2]; /* a bit for each entry that is -1 */

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

INLINE float value_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* The nearest bf16, halves to even; NaN stays one. */
INLINE uint16_t nearest_bf16(float value) {
    const uint32_t bits = bits_of(value), rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

/* Whether it is one term, of numbers that are drawn and all kept. */
INLINE int only_numbers(const Job *job) { return job->terms == 1 && job->term->book == NUMBERS && !job->term->limit; }

#include "native_levels.h"
static int level = 0; /* `zotune_level` chooses */

/* The base rows, (32, 64). Called once, before anything else. */
void zotune_codebook(const int8_t *rows) {
    memcpy(base_rows, rows, sizeof base_rows);
    memset(walsh, 0, sizeof walsh);
    for (int i = 0; i < ROW; i++)
        for (int j = 0; j < ROW; j++) {
            uint32_t odd = 0; /* the parity of the common bits */
            for (int common = i & j; common; common >>= 1) odd ^= common & 1;
            walsh[i][j / 32] |= odd << j % 32;
        }
}

/* Use an instruction set: 0 plain, 1 AVX2, 2 AVX-512; or the best that the processor has if it lacks that one, or for -1.
   Returns the one in use. */
int zotune_level(int wanted) {
    level = wanted < 0 || wanted > best() ? best() : wanted;
    return level;
}

/* The OpenMP runtime that torch has loaded: its GOMP_parallel, omp_get_thread_num and omp_get_num_threads. Taken as
   pointers, so that this file needs no OpenMP to build and never brings a second pool of threads. */
typedef void Parallel(void (*)(void *), void *, unsigned, unsigned);
static Parallel *parallel;
static int (*thread_number)(void), (*team_size)(void);

void zotune_threads(Parallel *run, int (*number)(void), int (*size)(void)) {
    parallel = run;
    thread_number = number;
    team_size = size;
}

#include "native_crossing.h"

static void share(void *data) {
    const Job *job = (const Job *)data;
    const int64_t me = thread_number(), team = team_size(), skip = job->rows ? 0 : job->start % BLOCK;
    const int64_t blocks = (skip + job->count + BLOCK - 1) / BLOCK; /* cuts lie between blocks: none is drawn twice */
    int64_t from = me * blocks / team * BLOCK - skip, to = (me + 1) * blocks / team * BLOCK - skip;
    if (from < 0) from = 0;
    if (to > job->count) to = job->count;
    if (from < to) WORK[level](job, from, to);
}

static void share_outs(void *data) {
    Job own = *(const Job *)data;
    for (int k = thread_number(), outs = own.outs; k < outs; k += team_size()) {
        own.out = ((const Job *)data)->out + k;
        own.outs = 1;
        WORK[level](&own, 0, own.count);
    }
}

/* Each term's scale times the base rows: changes of sign are exact, so these are all the products there are. */
static void scale_rows(const Job *job) {
    const int8_t *z = &base_rows[0][0];
    for (int t = 0; t < job->terms; t++) {
        float *single = (float *)job->scaled + t * BASE * ROW;
        double *wide = (double *)job->scaled + t * BASE * ROW;
        const float scale = (float)job->term[t].scale;
        if (job->term[t].book != NUMBERS) continue;
        if (job->kind == FP64)
            for (int i = 0; i < BASE * ROW; i++) wide[i] = job->term[t].scale * (z[i] * 0.03125);
        else
            for (int i = 0; i < BASE * ROW; i++) single[i] = scale * ((float)z[i] * 0.03125f);
    }
}

static Job unpacked(const char *packed) {
    Job job;
    memcpy(&job, packed, sizeof(Job));
    job.term = (const Term *)(packed + sizeof(Job));
    job.out = (const Out *)(job.term + job.terms);
    job.before = NULL;
    scale_rows(&job);
    return job;
}

/* A pair of fp32 matrices is multiplied in one call, of which two threads take a matrix each. Threads that share a cache
   write half of both, for which the noise is made once; others write the one that they will read. */
static void run_job(Job *job, int threads) {
    if (threads == 2 && parallel && job->outs == 2 && apart(job->kind)) {
        if (job->before) parallel(share, (void *)job->before, 2, 0);
        job->before = NULL;
        parallel(share_outs, job, 2, 0);
    } else if (threads > 1 && parallel)
        parallel(share, job, (unsigned)threads, 0);
    else
        WORK[level](job, 0, job->count);
}

void zotune_run(const char *packed, int threads) {
    Job job = unpacked(packed);
    run_job(&job, threads);
}

typedef struct {
    const Job *common;      /* kind and terms of all of them */
    const Place *place;
    int64_t places, blocks;
} Many;

/* Part `me` of `team` equal parts of the blocks of all places. */
static void update_part(const Many *many, int64_t me, int64_t team) {
    const int64_t from = me * many->blocks / team, to = (me + 1) * many->blocks / team;
    int64_t before = 0; /* blocks of the places so far */
    for (int64_t p = 0; p < many->places && before < to; p++) {
        const Place *place = many->place + p;
        const int64_t blocks = (place->count + BLOCK - 1) / BLOCK;
        const int64_t low = from > before ? from - before : 0, high = to - before < blocks ? to - before : blocks;
        before += blocks;
        if (low >= high) continue;
        const Out out = {place->stored, 0};
        Job job = *many->common;
        job.stored = place->stored;
        job.carried = place->carried;
        job.site = place->site;
        job.out = &out;
        WORK[level](&job, low * BLOCK, high * BLOCK < place->count ? high * BLOCK : place->count);
    }
}

static void share_many(void *data) { update_part((const Many *)data, thread_number(), team_size()); }

/* Add the terms of a Job, whose own tensors are not used, to whole tensors. */
void zotune_update_many(const char *packed, const Place *place, int64_t places, int threads) {
    const Job job = unpacked(packed);
    Many many = {&job, place, places, 0};
    for (int64_t p = 0; p < places; p++) many.blocks += (place[p].count + BLOCK - 1) / BLOCK;
    if (threads > 1 && parallel)
        parallel(share_many, &many, (unsigned)threads, 0);
    else
        update_part(&many, 0, 1);
}

/* An update of a whole tensor by terms of its own, and a Job that reads the tensor after it, in one pass. */
void zotune_update_and_run(const char *update, const char *packed, int threads) {
    const Job before = unpacked(update);
    Job job = unpacked(packed);
    job.before = &before;
    run_job(&job, threads);
}

static void share_thin(void *data) {
    const Thin *thin = (const Thin *)data;
    const int64_t me = thread_number(), team = team_size();
    THIN[level](thin, me * thin->rows / team, (me + 1) * thin->rows / team, thin->room + me * thin->room_each);
}

/* Rows are shared by the threads; none depends on another. */
void zotune_thin(const char *packed, int threads) {
    Thin thin;
    memcpy(&thin, packed, sizeof thin);
    if (threads > 1 && parallel)
        parallel(share_thin, &thin, (unsigned)threads, 0);
    else
        THIN[level](&thin, 0, thin.rows, thin.room);
}

static void share_values(void *data) {
    const Values *job = (const Values *)data;
    const int64_t me = thread_number(), team = team_size(), lines = (job->count + ROW - 1) / ROW;
    const int64_t to = (me + 1) * lines / team * ROW;
    (job->write ? WRITE : READ)[level](job, me * lines / team * ROW, to < job->count ? to : job->count);
}

static void run_values(Values *job, int threads) {
    if (threads > 1 && parallel)
        parallel(share_values, job, (unsigned)threads, 0);
    else
        (job->write ? WRITE : READ)[level](job, 0, job->count);
}

/* Values of `count` bf16 numbers, with their carried bits or (NULL) without. */
void zotune_read(uint16_t *stored, int16_t *carried, float *values, int64_t count, int threads) {
    Values job = {values, stored, carried, count, 0};
    run_values(&job, threads);
}

/* Keep values in bf16 numbers and carried bits. */
void zotune_write(uint16_t *stored, int16_t *carried, float *values, int64_t count, int threads) {
    Values job = {values, stored, carried, count, 1};
    run_values(&job, threads);
}

static void share_moments(void *data) {
    const Moments *job = (const Moments *)data;
    const int64_t me = thread_number(), team = team_size(), pieces = (job->count + PIECE - 1) / PIECE;
    for (int64_t piece = me * pieces / team; piece < (me + 1) * pieces / team; piece++) MOMENTS[level](job, piece);
}

/* sums[2 * piece + k]: of (x - pivot)^(k + 1) over each piece. */
void zotune_moments(const void *values, int wide, int64_t count, double pivot, double *sums, int threads) {
    Moments job = {values, sums, count, pivot, wide};
    if (threads > 1 && parallel)
        parallel(share_moments, &job, (unsigned)threads, 0);
    else
        for (int64_t piece = 0; piece * PIECE < count; piece++) MOMENTS[level](&job, piece);
}

static void count_team(void *data) {
    if (thread_number() == 0) *(int *)data = team_size();
}

/* How many threads a region really gets. */
int zotune_team(int threads) {
    int team = 1;
    if (parallel) parallel(count_team, &team, (unsigned)threads, 0);
    return team;
}

/* Raised with every change of Job, Term or of what a function means: native.py refuses any other. */
int zotune_abi(void) { return 8; }
