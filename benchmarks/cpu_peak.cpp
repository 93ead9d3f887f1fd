// What the CPU can do at most: multiply-accumulates on registers alone, on several threads at once.
//
//     cpu_peak int8|f32 THREADS SECONDS
//
// One vpdpbusd on 512 bits multiplies 64 pairs of bytes and adds them: 128 operations. One FMA on 512 bits: 16 pairs of
// float32, 32 operations. 20 accumulators hide the latency of both (4 or 5 cycles, 2 per cycle at most); nothing is
// loaded or stored in the loop. Every lane of every accumulator is compared with what it must be.
// Prints {"gops": 1e9 operations per second of wall time, all threads together, "wall": s, "cpu": s of all threads}.

#include <immintrin.h>
#include <sys/resource.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

using Clock = std::chrono::steady_clock;
constexpr int accumulators = 20;
constexpr long loops_per_look = 50'000;  // about 0.1 ms between two looks at the clock

struct Result {
    long loops = 0;
    bool right = true;
};

// Loads the accumulators into registers, repeats `instruction` on each of them, and stores them. In assembly, as GCC 12
// copies and spills the accumulators in every turn of such a loop of intrinsics.
#define EACH(line) ".irp k,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19\n" line "\n.endr\n"
#define BURST(instruction, state, a, b, loops)                                                             \
    asm volatile(EACH("vmovdqu64 64*\\k(%1), %%zmm\\k")                                                    \
                 ".p2align 5\n"                                                                            \
                 "1:\n" EACH(instruction " %3, %2, %%zmm\\k")                                              \
                 "dec %0\n"                                                                                \
                 "jnz 1b\n" EACH("vmovdqu64 %%zmm\\k, 64*\\k(%1)")                                         \
                 : "+r"(loops)                                                                             \
                 : "r"(state), "v"(a), "v"(b)                                                              \
                 : "memory", "cc", "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", \
                   "zmm9", "zmm10", "zmm11", "zmm12", "zmm13", "zmm14", "zmm15", "zmm16", "zmm17",         \
                   "zmm18", "zmm19")

// acc += 4 products a * b in each of 16 lanes, modulo 2^32
static void int8_burst(__m512i* acc, __m512i a, __m512i b, long loops) { BURST("vpdpbusd", acc, a, b, loops); }

// acc = acc * factor + add
static void f32_burst(__m512* acc, __m512 factor, __m512 add, long loops) {
    BURST("vfmadd213ps", acc, factor, add, loops);
}

static void int8_loop(Clock::time_point end, Result& result) {
    __m512i acc[accumulators];
    for (int k = 0; k < accumulators; ++k) acc[k] = _mm512_set1_epi32(k);
    for (; Clock::now() < end; result.loops += loops_per_look) {
        int8_burst(acc, _mm512_set1_epi8(3), _mm512_set1_epi8(5), loops_per_look);
    }
    for (int k = 0; k < accumulators; ++k) {
        uint32_t lanes[16];
        std::memcpy(lanes, &acc[k], sizeof lanes);
        for (uint32_t lane : lanes) result.right &= lane == uint32_t(k) + uint32_t(4 * 3 * 5) * uint32_t(result.loops);
    }
}

static void f32_loop(Clock::time_point end, Result& result) {
    __m512 acc[accumulators];
    for (int k = 0; k < accumulators; ++k) acc[k] = _mm512_set1_ps(float(k));
    for (; Clock::now() < end; result.loops += loops_per_look) {
        f32_burst(acc, _mm512_set1_ps(0.5f), _mm512_set1_ps(1.0f), loops_per_look);
    }
    for (int k = 0; k < accumulators; ++k) {
        float lanes[16];
        std::memcpy(lanes, &acc[k], sizeof lanes);
        for (float lane : lanes) result.right &= std::fabs(lane - 2.0f) < 1e-5f;  // where x / 2 + 1 = x
    }
}

static double cpu_seconds() {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    const auto seconds = [](timeval t) { return double(t.tv_sec) + 1e-6 * double(t.tv_usec); };
    return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

int main(int count, char** words) {
    if (count != 4) {
        std::fprintf(stderr, "usage: cpu_peak int8|f32 THREADS SECONDS\n");
        return 2;
    }
    const bool is_int8 = std::strcmp(words[1], "int8") == 0;
    const auto work = is_int8 ? int8_loop : f32_loop;
    const double operations = accumulators * (is_int8 ? 128.0 : 32.0);
    const int threads = std::atoi(words[2]);
    const auto length = std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(std::atof(words[3])));

    std::vector<Result> results(threads);
    std::vector<std::thread> pool;
    const double cpu = cpu_seconds();
    const auto start = Clock::now();
    for (Result& result : results) pool.emplace_back(work, start + length, std::ref(result));
    for (std::thread& thread : pool) thread.join();
    const double wall = std::chrono::duration<double>(Clock::now() - start).count();

    double total = 0;
    for (const Result& result : results) {
        if (!result.right) {
            std::fprintf(stderr, "the loop computed something else than it should\n");
            return 1;
        }
        total += operations * double(result.loops);
    }
    std::printf("{\"gops\": %.1f, \"wall\": %.4f, \"cpu\": %.4f}\n", total / wall / 1e9, wall, cpu_seconds() - cpu);
    return 0;
}
