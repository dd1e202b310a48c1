/* What native.c and its loops agree on: sizes, and what kernels/native_packing.py hands over. */

#define ROW 64          /* numbers in a row of the codebook, and elements worked on at once */
#define BASE 32         /* base rows of the codebook: a row is one of them, with the signs of a Walsh row, with a sign */
#define BLOCK 512       /* elements of a Philox block: 8 rows of numbers; a block of signs is a quarter of that */
#define TILE 4096       /* elements whose words are drawn at once */
#define COUNTERS 8      /* counters that go through Philox together */
#define MASK_COUNTERS 32 /* and for masks, which need many */
#define WORDS (TILE / 32) /* random words of a tile: one bit for each sign; numbers need a quarter */
#define MOST_TERMS 256
#define PIECE 32768     /* numbers whose sums are one tree: LEVELS - 1 halvings of its rows */
#define LEVELS 10
#define LANES 16        /* partial sums of a dot product */
#define FOUR 4
typedef float Lanes __attribute__((vector_size(4 * LANES)));
#define INLINE static inline __attribute__((always_inline))
#define NOT_INLINE __attribute__((noinline))
#define RESTRICT __restrict__

/* Books: drawn ones, numbers of a tensor, and left @ right of which every sum is exact: in fp64, or in fp32 already. */
enum { NUMBERS, SIGNS, GIVEN_FP32, GIVEN_FP64, GIVEN_BF16, LOW_RANK, LOW_RANK_FP32 };
enum { FP32, FP64, BF16, BF16_CARRIED, BF16_SPLIT }; /* what is read and written; the last writes `carried` too */

typedef struct {
    uint32_t key[2];
    int32_t book, limit;    /* limit above 0: elements whose 16 random bits are not below it are left out */
    double scale;
    uint32_t mask[2];       /* key of those bits */
    const void *numbers;    /* of the whole site; or the left factor, fp32, `down` and `along` numbers apart; or NULL */
    const float *right;     /* (rank, width) */
    int64_t width, rank, down, along;
} Term;

typedef struct {
    void *tensor;
    int64_t minus;          /* subtract the sum */
} Out;

/* A whole tensor that is updated beside others. */
typedef struct {
    void *stored;
    int16_t *carried;       /* or NULL */
    uint64_t site;
    int64_t count;
} Place;

/* What native.py packs: a Job, its Terms, its Outs. */
typedef struct Job {
    void *scaled;           /* room for BASE * ROW numbers of each term, in the precision of the sums */
    const void *stored;
    int16_t *carried;       /* or NULL */
    const int64_t *rows;    /* or NULL */
    uint64_t site;
    int64_t start, count;   /* a run of elements; with `rows`, their number in all */
    int64_t width;          /* elements in a row of the tensor */
    int32_t kind, terms, outs, unused;
    const Term *term;       /* these three are set here */
    const Out *out;
    const struct Job *before; /* or NULL: an update of the same elements, made first */
} Job;

/* y += (x kept^T) fresh, with a fresh factor for each copy of the rows: what `zotune_thin` is told. */
typedef struct {
    void *y;                /* (rows, out), bf16 or fp32, as x */
    const void *x;          /* (rows, in) */
    const float *kept;      /* (rank, in) */
    const float *fresh;     /* (rank, out) or turned (out, rank) of each copy, `step` numbers apart */
    float *room;            /* `room_each` numbers for each thread */
    int64_t rows, each;     /* rows in all, and of a copy */
    int64_t in, out, rank, step, room_each;
    int64_t bf16, turned;
} Thin;

/* Values of a bf16 tensor, and where they are kept. */
typedef struct {
    float *values;
    uint16_t *stored;
    int16_t *carried;       /* or NULL, to read */
    int64_t count;
    int write;
} Values;

typedef struct {
    const void *values;
    double *sums;           /* two for each piece */
    int64_t count;
    double pivot;
    int wide;               /* fp64, else fp32 */
} Moments;

/* What a tile needs of one term. */
typedef struct {
    uint32_t words[WORDS];
    uint64_t kept[TILE / ROW]; /* a bit for each element, where there is a mask */
} Drawn;
