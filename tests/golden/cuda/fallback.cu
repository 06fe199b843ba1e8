extern "C" __global__ void __launch_bounds__(256) main_kernel(half* __restrict__ T_multiply_intermediate_ptr, half* __restrict__ bias_ptr, uchar* __restrict__ indices_ptr, half* __restrict__ values_ptr, half* __restrict__ x_ptr) {
  alignas(64) float balanced_sparse_dense_local_ptr[1];
  int cse_v2 = (((int)threadIdx.x) % 50);
  for (int ax2 = 0; ax2 < 18; ++ax2) {
    if (((int)threadIdx.x) < 150) {
      if (ax2 == 0) {
        balanced_sparse_dense_local_ptr[0] = 0x0p+0f/*0.000000e+00*/;
      }
      int cse_v1 = (ax2 / 3);
      int cse_v3 = (((((int)threadIdx.x) % 50) * 9) + (ax2 >> 1));
      uchar cse_v4 = ((uchar)((ax2 & 1) * 4));
      half condval;
      if ((((ax2 / 3) * 8) + (((int)((indices_ptr[(((((int)threadIdx.x) % 50) * 9) + (ax2 >> 1))] >> ((uchar)((ax2 & 1) * 4))) & (uchar)15)) >> 1)) < 35) {
        condval = x_ptr[((((((int)threadIdx.x) / 50) * 70) + ((ax2 / 3) * 16)) + ((int)((indices_ptr[(((((int)threadIdx.x) % 50) * 9) + (ax2 >> 1))] >> ((uchar)((ax2 & 1) * 4))) & (uchar)15)))];
      } else {
        condval = __float2half_rn(0x0p+0f/*0.000000e+00*/);
      }
      balanced_sparse_dense_local_ptr[0] = (balanced_sparse_dense_local_ptr[0] + (((float)condval) * ((float)values_ptr[(((((int)threadIdx.x) % 50) * 18) + ax2)])));
    }
  }
  if (((int)threadIdx.x) < 150) {
    T_multiply_intermediate_ptr[((int)threadIdx.x)] = ((((half)balanced_sparse_dense_local_ptr[0]) + bias_ptr[(((int)threadIdx.x) % 50)]) * (__float2half_rn(0x1p-1f/*5.000000e-01*/) + (((half)erff(((float)((((half)balanced_sparse_dense_local_ptr[0]) + bias_ptr[(((int)threadIdx.x) % 50)]) * __float2half_rn(0x1.6a09e667f3bcdp-1f/*7.071068e-01*/))))) * __float2half_rn(0x1p-1f/*5.000000e-01*/))));
  }
}
