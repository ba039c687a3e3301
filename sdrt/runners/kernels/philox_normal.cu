// Normal numbers of a CUDA generator: the same as sdrt/philox.py, made on the device. One thread makes one number.
// philox_normal.ptx is compiled from this file by `make kernels`.

extern "C" __global__ void philox_normal(float* values, unsigned count, unsigned seed_low, unsigned seed_high,
                                         unsigned offset)
{
    const unsigned index = blockIdx.x * blockDim.x + threadIdx.x;
    if (index >= count) {
        return;
    }
    unsigned x = offset, y = 0, z = index, w = 0;
    for (int round = 0; round < 10; ++round) {
        const unsigned first_high = __umulhi(0xD2511F53u, x), first_low = 0xD2511F53u * x;
        const unsigned second_high = __umulhi(0xCD9E8D57u, z), second_low = 0xCD9E8D57u * z;
        x = second_high ^ y ^ seed_low;
        y = second_low;
        z = first_high ^ w ^ seed_high;
        w = first_low;
        seed_low += 0x9E3779B9u;
        seed_high += 0xBB67AE85u;
    }
    const float unit = 2.3283064e-10f;
    const float angle_unit = 2.3283064e-10f * 6.2831855f;
    const float uniform = x * unit + unit / 2;
    const float angle = y * angle_unit + angle_unit / 2;
    values[index] = sqrtf(-2.0f * logf(uniform)) * __sinf(angle);
}
