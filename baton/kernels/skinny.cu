// out[M, N] = x[M, K] · weight[N, K]ᵀ (+ bias) for few rows: a stream of weights at the memory's speed.
//
// A block owns ROWS rows of the weight and all M (≤ TOKENS) rows of x. One warp copies tiles of both into a ring of STAGES buffers with the
// tensor copy engine; WARPS_N × WARPS_K warps multiply them, weights as the 16-row operand of mma.m16n8k16. The weights' first tiles are
// asked for before the previous kernel has ended (they depend on no kernel), x only after griddepcontrol.wait.
// PAIR: the weight is [gate; up], each N / 2 rows; the block takes ROWS / 2 of each and stores silu(gate) · up.
// ADD: what out holds is added.
// Compiled at run time after common.cuh, with: ROWS TOKENS WARPS_N WARPS_K BLOCK_K STAGES PAIR ADD BIAS HALF ALIAS (macros, integers).

constexpr int WARPS = WARPS_N * WARPS_K;
constexpr int THREADS = WARPS * 32;
constexpr int BOXES = BLOCK_K / 64;
constexpr int SLABS = ROWS / 16 / WARPS_N;
constexpr int COLUMNS = TOKENS / 8;
constexpr int STEPS = BLOCK_K / 16 / WARPS_K;
constexpr u32 W_BOX = ROWS * 128, X_BOX = TOKENS * 128;
constexpr u32 STAGE = BOXES * (W_BOX + X_BOX);
constexpr int PITCH = ROWS + 4;
constexpr int OUT_ROWS = PAIR ? ROWS / 2 : ROWS;
static_assert(ROWS % (16 * WARPS_N) == 0 && BLOCK_K % (16 * WARPS_K) == 0 && BLOCK_K % 64 == 0 && TOKENS % 8 == 0);
static_assert(TOKENS == 8 || TOKENS % 16 == 0);
static_assert(OUT_ROWS % 8 == 0);

__device__ __forceinline__ void load4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address));
}

__device__ __forceinline__ void load2(u32& a, u32& b, u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(a), "=r"(b) : "r"(address));
}

__device__ __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if HALF
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void consumers_sync() { asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory"); }

__device__ __forceinline__ float total(const float* sums, int token, int row) {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < WARPS_K; ++part) sum += sums[(part * TOKENS + token) * PITCH + row];
    return sum;
}

__device__ __forceinline__ u16 finished(const float* sums, int token, int row, int n, int outputs, const u16* bias, const u16* before) {
    float value = total(sums, token, row);
    if (BIAS) value += widen(bias[n]);
    if (ADD) value += widen(*before);
    if (!PAIR) return narrow(value);
    float up = total(sums, token, ROWS / 2 + row);
    if (BIAS) up += widen(bias[outputs + n]);
    return silu_mul(value, up);
}

extern "C" __global__ void __launch_bounds__(THREADS + 32, 1)
    skinny(const __grid_constant__ TensorMap weight, const __grid_constant__ TensorMap x, u16* out, const u16* bias, int tokens, int outputs, int depth) {
    extern __shared__ __align__(1024) char memory[];
    __shared__ alignas(8) u64 bars[2 * STAGES];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 ring = shared_address(memory), full = shared_address(bars), empty = full + 8 * STAGES;
    float* sums = (float*)(memory + (ALIAS ? 0 : STAGES * STAGE));
    asm volatile("griddepcontrol.launch_dependents;");
    const int first = blockIdx.x, stride = gridDim.x;
    const int tiles = (outputs + OUT_ROWS - 1) / OUT_ROWS;
    const int length = (depth + BLOCK_K - 1) / BLOCK_K;

    if (warp == WARPS) {
        const int mine = (first < tiles ? (tiles - first + stride - 1) / stride : 0) * length;
        const int ahead = min(mine, STAGES);
        auto load_weight = [&](int i) {
            const int slot = i % STAGES, row = (first + i / length * stride) * OUT_ROWS, column = i % length * BLOCK_K;
            const u32 to = ring + slot * STAGE, bar = full + 8 * slot;
            barrier_expect(bar, STAGE);
            for (int b = 0; b < BOXES; ++b) {
                copy_box(to + b * W_BOX, &weight, column + 64 * b, row, bar, EVICT_FIRST);
                if (PAIR) copy_box(to + b * W_BOX + W_BOX / 2, &weight, column + 64 * b, outputs + row, bar, EVICT_FIRST);
            }
        };
        auto load_x = [&](int i) {
            const int slot = i % STAGES, column = i % length * BLOCK_K;
            const u32 to = ring + slot * STAGE + BOXES * W_BOX;
            for (int b = 0; b < BOXES; ++b) copy_box(to + b * X_BOX, &x, column + 64 * b, 0, full + 8 * slot, EVICT_LAST);
        };
        if (lane == 0) {
            for (int i = 0; i < STAGES; ++i) {
                barrier_init(full + 8 * i, 1);
                barrier_init(empty + 8 * i, WARPS);
            }
            asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
            for (int i = 0; i < ahead; ++i) load_weight(i);
        }
        __syncwarp();
        __syncthreads();
        if (lane == 0) {
            asm volatile("griddepcontrol.wait;" ::: "memory");
            for (int i = 0; i < ahead; ++i) load_x(i);
            for (int i = ahead; i < mine; ++i) {
                barrier_wait(empty + 8 * (i % STAGES), (i / STAGES - 1) & 1);
                load_weight(i);
                load_x(i);
            }
        }
        return;
    }
    __syncthreads();

    const int wn = warp % WARPS_N, wk = warp / WARPS_N;
    const int a_row = lane & 15, a_chunk = lane >> 4;
    const int b_row = (lane & 7) + (lane >> 4) * 8, b_chunk = (lane >> 3) & 1;
    int done = 0;
    for (int tile = first; tile < tiles; tile += stride) {
        float c[SLABS][COLUMNS][4] = {};
        for (int i = 0; i < length; ++i, ++done) {
            const int slot = done % STAGES;
            const u32 w_at = ring + slot * STAGE, x_at = w_at + BOXES * W_BOX;
            barrier_wait(full + 8 * slot, (done / STAGES) & 1);
#pragma unroll
            for (int s = 0; s < STEPS; ++s) {
                const int step = wk * STEPS + s, box = step / 4, chunk = step % 4 * 2;
                u32 a[SLABS][4], b[COLUMNS][2];
#pragma unroll
                for (int j = 0; j < SLABS; ++j) {
                    const int row = (wn * SLABS + j) * 16 + a_row;
                    load4(a[j], w_at + box * W_BOX + row * 128 + (((chunk + a_chunk) ^ (row & 7)) << 4));
                }
                const u32 x_box = x_at + box * X_BOX;
                if (COLUMNS == 1) {
                    load2(b[0][0], b[0][1], x_box + (lane & 7) * 128 + (((chunk + b_chunk) ^ (lane & 7)) << 4));
                } else {
#pragma unroll
                    for (int j = 0; j + 1 < COLUMNS; j += 2) {
                        const int row = j * 8 + b_row;
                        u32 r[4];
                        load4(r, x_box + row * 128 + (((chunk + b_chunk) ^ (row & 7)) << 4));
                        b[j][0] = r[0], b[j][1] = r[1], b[j + 1][0] = r[2], b[j + 1][1] = r[3];
                    }
                }
#pragma unroll
                for (int j = 0; j < SLABS; ++j)
#pragma unroll
                    for (int k = 0; k < COLUMNS; ++k) multiply(c[j][k], a[j], b[k][0], b[k][1]);
            }
            __syncwarp();
            if (lane == 0) barrier_arrive(empty + 8 * slot);
        }

        if (ALIAS) consumers_sync();  // the sums lie where tiles were
        if (ADD) asm volatile("griddepcontrol.wait;" ::: "memory");
#pragma unroll
        for (int j = 0; j < SLABS; ++j)
#pragma unroll
            for (int k = 0; k < COLUMNS; ++k) {
                float* at = sums + (wk * TOKENS + k * 8 + lane % 4 * 2) * PITCH + (wn * SLABS + j) * 16 + lane / 4;
                at[0] = c[j][k][0], at[PITCH] = c[j][k][1], at[8] = c[j][k][2], at[PITCH + 8] = c[j][k][3];
            }
        consumers_sync();
        for (int e = threadIdx.x; e < tokens * (OUT_ROWS / 2); e += THREADS) {
            const int token = e / (OUT_ROWS / 2), row = e % (OUT_ROWS / 2) * 2, n = tile * OUT_ROWS + row;
            if (n >= outputs) continue;
            u16* to = out + (u64)token * outputs + n;
            const u16 low = finished(sums, token, row, n, outputs, bias, to);
            if (n + 1 >= outputs) {
                *to = low;
                continue;
            }
            const u16 high = finished(sums, token, row + 1, n + 1, outputs, bias, to + 1);
            if (outputs % 2 == 0) {
                *(u32*)to = low | (u32)high << 16;
            } else {
                to[0] = low, to[1] = high;
            }
        }
        if (tile + stride < tiles) consumers_sync();
    }
}
