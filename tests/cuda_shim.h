// What kernels/ohem/ohem.cu needs of CUDA, for g++ -std=c++20: the kernels run on the CPU.
//
// A block of one thread runs on the caller's thread, one block after another. In larger blocks every CUDA thread is a
// std::thread and __syncthreads is a std::barrier; blocks still follow one another, so that static memory can be the
// shared memory.

#include <atomic>
#include <barrier>
#include <cmath>
#include <cstring>
#include <memory>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#define OHEM_ON_CPU
#define __CUDA_ARCH__ 0
#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))

struct Dim3 { unsigned x; };
struct alignas(16) float4 { float x, y, z, w; };
static thread_local Dim3 threadIdx, blockIdx;
static Dim3 blockDim, gridDim;
static std::unique_ptr<std::barrier<>> everyone;
static std::atomic<int> flag;

inline void __syncthreads() {
    if (blockDim.x > 1) everyone->arrive_and_wait();
}
inline int __syncthreads_or(int predicate) {
    if (predicate) flag = 1;
    __syncthreads();
    const int result = flag;
    __syncthreads();
    if (threadIdx.x == 0) flag = 0;
    __syncthreads();
    return result;
}
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
template <class T> inline T atomicAdd(T* to, T value) { return __atomic_fetch_add(to, value, __ATOMIC_SEQ_CST); }
template <class T> inline T atomicOr(T* to, T value) { return __atomic_fetch_or(to, value, __ATOMIC_SEQ_CST); }

inline float __uint_as_float(unsigned bits) { float x; std::memcpy(&x, &bits, 4); return x; }
inline unsigned __float_as_uint(float x) { unsigned bits; std::memcpy(&bits, &x, 4); return bits; }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
using std::fma, std::fmaf, std::fmaxf, std::fminf;

struct half;
struct bfloat16;
// With noise these err as much as the instructions of a GPU may (PTX: ex2.approx.ftz by 2^-22 of the result,
// lg2.approx.ftz by 2^-22, of the result outside of 0.5 to 2), and numbers below 2^-126 are 0.
static bool noisy = false;
extern "C" void make_noise(int on) { noisy = on; }
inline float noise(float x) {
    const unsigned hash = (__float_as_uint(x) ^ __float_as_uint(x) >> 15) * 2654435761u;
    return float(int(hash)) * 0x1p-31f * 0x1p-22f;
}
inline float fast_exp2(float x) {
    const float y = std::exp2f(x);
    return !noisy ? y : x < -126.0f ? 0.0f : y * (1.0f + noise(x));
}
inline float fast_log2(float x) {
    const float y = std::log2f(x);
    return !noisy ? y : x < 0x1p-126f ? -INFINITY : y + noise(x) * (x > 0.5f && x < 2.0f ? 1.0f : y);
}
inline float to_float(half);
inline void store(half*, float);

#include OHEM_SOURCE

inline float to_float(half x) { _Float16 value; std::memcpy(&value, &x, 2); return float(value); }
inline void store(half* to, float x) { const _Float16 value = _Float16(x); std::memcpy(to, &value, 2); }

static long long only_block = -1;
extern "C" void run_only(long long block) { only_block = block; }

template <class... Arguments>
static void launch(void (*kernel)(Arguments...), unsigned grid, unsigned block, void** arguments) {
    blockDim.x = block;
    gridDim.x = grid;
    everyone = std::make_unique<std::barrier<>>(block);
    const unsigned end = only_block < 0 ? grid : unsigned(only_block) + 1;
    const auto blocks_of = [&](unsigned thread) {
        threadIdx.x = thread;
        for (blockIdx.x = only_block < 0 ? 0 : unsigned(only_block); blockIdx.x < end; ++blockIdx.x) {
            [&]<std::size_t... I>(std::index_sequence<I...>) {
                kernel(*static_cast<std::remove_reference_t<Arguments>*>(arguments[I])...);
            }(std::index_sequence_for<Arguments...>{});
            __syncthreads();
        }
    };
    std::vector<std::thread> threads;
    for (unsigned i = 1; i < block; ++i) threads.emplace_back(blocks_of, i);
    blocks_of(0);
    for (auto& thread : threads) thread.join();
}

#define EXPORT(kernel) \
    extern "C" void launch_##kernel(unsigned grid, unsigned block, void** arguments) { launch(kernel, grid, block, arguments); }
EXPORT(ohem_forward)
EXPORT(ohem_refine)
EXPORT(ohem_backward)
