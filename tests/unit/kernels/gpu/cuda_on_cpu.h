/* Enough of CUDA to run kernel.cu on a CPU: every thread of a block is a context of its own, which yields at barriers.
 *
 * A round resumes all threads of a block in turn, forwards or backwards; a race between them that a barrier should have
 * prevented shows as a difference between the two.  Threads of a block that end while others wait at a barrier, or wait
 * at different ones, are an error, as they would hang a card.
 */
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <setjmp.h>
#include <ucontext.h>
#include <utility>
#include <vector>

struct Dim { unsigned x, y, z; };
static Dim threadIdx, blockIdx;

#define __global__
#define __device__ static
#define __forceinline__ inline
#define __shared__ static /* blocks run one after another */
#define __launch_bounds__(n)
#ifndef THREADS
#define THREADS 256
#endif

namespace on_cpu {
enum { STACK = 64 << 10, DONE = -1 };
struct Fiber {
    ucontext_t start;
    jmp_buf at;
    std::vector<char> stack = std::vector<char>(STACK);
    int waits; /* line of the barrier that it waits at */
};
static Fiber fibers[THREADS];
static jmp_buf scheduler;
static void (*body)(void *);
static void *arguments;
static uint64_t lanes[THREADS]; /* what the threads hand to one another */

static void barrier(int line)
{
    Fiber &self = fibers[threadIdx.x];
    self.waits = line;
    if (!_setjmp(self.at))
        _longjmp(scheduler, 1);
}

static void entry()
{
    body(arguments);
    fibers[threadIdx.x].waits = DONE;
    _longjmp(scheduler, 1);
}

static void resume(unsigned t, bool begin)
{
    threadIdx.x = t;
    if (_setjmp(scheduler))
        return;
    if (begin)
        setcontext(&fibers[t].start);
    else
        _longjmp(fibers[t].at, 1);
}

/* One block; false where its threads do not meet. */
static bool block(bool backwards)
{
    for (Fiber &f : fibers) {
        getcontext(&f.start);
        f.start.uc_stack.ss_sp = f.stack.data();
        f.start.uc_stack.ss_size = STACK;
        f.start.uc_link = nullptr;
        makecontext(&f.start, entry, 0);
    }
    for (bool begin = true;; begin = false) {
        for (unsigned i = 0; i < THREADS; i++)
            resume(backwards ? THREADS - 1 - i : i, begin);
        for (Fiber &f : fibers)
            if (f.waits != fibers[0].waits)
                return false;
        if (fibers[0].waits == DONE)
            return true;
    }
}

/* What another lane of the warp has handed in; a barrier before and one after, so that all have written and read. */
template <class T> static T shuffle_down(T v, unsigned d)
{
    static_assert(sizeof v <= sizeof *lanes, "");
    const unsigned t = threadIdx.x;
    memcpy(&lanes[t], &v, sizeof v);
    barrier(__LINE__);
    T found = v;
    if (t % 32 + d < 32)
        memcpy(&found, &lanes[t + d], sizeof found);
    barrier(__LINE__);
    return found;
}

static unsigned reduce_add(unsigned v)
{
    const unsigned t = threadIdx.x;
    lanes[t] = v;
    barrier(__LINE__);
    unsigned sum = 0;
    for (unsigned i = t - t % 32; i < t - t % 32 + 32; i++)
        sum += (unsigned)lanes[i];
    barrier(__LINE__);
    return sum;
}

template <class... A, size_t... I> static void call(void (*kernel)(A...), void **argv, std::index_sequence<I...>)
{
    kernel(*(A *)argv[I]...);
}

template <class... A> struct Call {
    void (*kernel)(A...);
    void **argv;
    static void run(void *self)
    {
        const Call &c = *(Call *)self;
        call(c.kernel, c.argv, std::index_sequence_for<A...>());
    }
};

/* Pointers to the arguments, as cuLaunchKernel takes them. */
template <class... A> static int launch(void (*kernel)(A...), void **argv, unsigned x, unsigned y, bool backwards)
{
    Call<A...> c{kernel, argv};
    body = Call<A...>::run;
    arguments = &c;
    for (blockIdx.y = 0; blockIdx.y < y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < x; blockIdx.x++)
            if (!block(backwards))
                return -1;
    return 0;
}
} // namespace on_cpu

#define __syncthreads() on_cpu::barrier(-2 - __LINE__)
#define __shfl_down_sync(mask, v, d) on_cpu::shuffle_down(v, d)
#define __reduce_add_sync(mask, v) on_cpu::reduce_add(v)
static inline unsigned long long atomicAdd(unsigned long long *at, unsigned long long v) { return *at += v, *at - v; }
static inline float __int_as_float(int i) { float f; memcpy(&f, &i, 4); return f; }
static inline long long __double_as_longlong(double d) { long long i; memcpy(&i, &d, 8); return i; }
static inline double __longlong_as_double(long long i) { double d; memcpy(&d, &i, 8); return d; }

#include KERNEL

extern "C" int launch(const char *name, void **argv, unsigned x, unsigned y, int backwards)
{
#define TRY(kernel) \
    if (!strcmp(name, #kernel)) \
        return on_cpu::launch(kernel, argv, x, y, backwards);
    TRY(visit)
    TRY(finish_rows)
    TRY(finish_pixels)
    TRY(regions)
    return -2;
}
