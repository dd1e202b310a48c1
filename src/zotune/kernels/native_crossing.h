/* How long it takes a thread to read what another one has just written: on cores that share a second-level cache, a
   third-level one, or none. The host of a virtual machine may move its processors from one to the other while it runs, so
   it is looked at again and again. Which thread writes what follows from it, and how long that takes; no bit does. */

#include <time.h>

#define LINE 32             /* words in two lines of the cache, which may be fetched together */
#define LINES 256
#define LOOKS 3             /* the quickest of so many: threads are interrupted */
#define LOOK_AGAIN 0.1      /* seconds; a look takes a tenth of a millisecond */
#define APART 60            /* nanoseconds a line: some 6, 33 and 130 were measured for the three */

static int32_t chain[LINES * LINE] __attribute__((aligned(64))); /* each line holds the number of the next */

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec * 1e9 + (double)time.tv_nsec;
}

/* In an order that is not foreseen: 5 i + 77 modulo 256 comes by every line. */
static void write_chain(void *unused) {
    (void)unused;
    for (int i = 0; thread_number() == 1 && i < LINES; i++)
        *(volatile int32_t *)(chain + LINE * i) = (5 * i + 77) % LINES;
}

static void read_chain(void *quickest) {
    if (thread_number() != 0) return;
    const double start = now();
    int32_t at = 0;
    for (int i = 0; i < LINES; i++) at = *(const volatile int32_t *)(chain + LINE * at);
    const double each = (now() - start) / LINES;
    if (each < *(double *)quickest) *(double *)quickest = each;
}

/* Nanoseconds that a line takes; 0 without threads. */
double zotune_crossing(void) {
    double quickest = parallel ? 1e9 : 0;
    for (int look = 0; parallel && look < LOOKS; look++) {
        parallel(write_chain, NULL, 2, 0);
        parallel(read_chain, &quickest, 2, 0);
    }
    return quickest;
}

static int wanted = -1;

/* Whether a thread writes an out of this kind whole: where threads share no cache, and only fp32, of which two threads take a
   product each. Others' products were seen to be shared otherwise. Callers on several threads may look at once; the last
   one's finding holds. */
static int apart(int kind) {
    static double looked;
    static int found;
    if (wanted >= 0) return wanted;
    if (kind != FP32) return 0;
    const double time = now();
    if (!looked || time - looked > LOOK_AGAIN * 1e9) {
        found = zotune_crossing() > APART;
        looked = time;
    }
    return found;
}

/* Choose: 0, 1, or -1: as is found. Returns what holds now for fp32. */
int zotune_apart(int choice) {
    wanted = choice;
    return apart(FP32);
}
