extern "C" __global__ void __launch_bounds__(256) main_kernel(half* __restrict__ T_add_intermediate_ptr, half* __restrict__ bias_ptr, uchar* __restrict__ indices_ptr, half* __restrict__ values_ptr, half* __restrict__ x_ptr) {
  alignas(64) float balanced_partial_local_ptr[1];
  alignas(64) ushort balanced_rows_local_ptr[8];
  __shared__ alignas(64) float balanced_data_shared_ptr[512];
  alignas(64) half balanced_values_local_ptr[16];
  alignas(64) uint balanced_indices_local_ptr[2];
  alignas(64) float balanced_sparse_dense_local_ptr[1];
  balanced_partial_local_ptr[0] = 0x0p+0f/*0.000000e+00*/;
  int cse_v1 = (((int)threadIdx.y) * 256);
  int cse_v2 = (((int)threadIdx.x) * 8);
  int cse_v8 = ((((int)threadIdx.y) * 256) + (((int)threadIdx.x) * 8));
  if (((int)threadIdx.y) < 2) {
      uint4 v_ = *(uint4*)(x_ptr + ((((int)threadIdx.y) * 256) + (((int)threadIdx.x) * 8)));
    *(uint4*)(balanced_rows_local_ptr + 0) = (*(uint4 *)(&(v_)));
  }
  for (int ax3_2_0 = 0; ax3_2_0 < 2; ++ax3_2_0) {
    if (((int)threadIdx.y) < 2) {
      int cse_v3 = (ax3_2_0 * 4);
      float4 __1;
        ushort4 v__1 = *(ushort4*)(balanced_rows_local_ptr + (ax3_2_0 * 4));
      half4 v__2 = *(half4 *)(&(v__1));
      __1.x = (float)(v__2.x);
      __1.y = (float)(v__2.y);
      __1.z = (float)(v__2.z);
      __1.w = (float)(v__2.w);
      *(float4*)(balanced_data_shared_ptr + (((((int)threadIdx.y) * 256) + (((int)threadIdx.x) * 8)) + (ax3_2_0 * 4))) = __1;
    }
  }
  for (int ax2 = 0; ax2 < 2; ++ax2) {
    *(uint4*)(balanced_values_local_ptr + (ax2 * 8)) = *(uint4*)(values_ptr + ((((((int)blockIdx.x) * 4096) + (((int)threadIdx.y) * 512)) + (ax2 * 256)) + (((int)threadIdx.x) * 8)));
  }
  for (int ax2_1 = 0; ax2_1 < 2; ++ax2_1) {
      uint v__3 = *(uint*)(indices_ptr + ((((((int)blockIdx.x) * 2048) + (((int)threadIdx.y) * 256)) + (ax2_1 * 128)) + (((int)threadIdx.x) * 4)));
    balanced_indices_local_ptr[ax2_1] = (*(uint *)(&(v__3)));
  }
  uint cse_v4 = ((uint)1 << (uint)0);
  uint cse_v9 = ((uint)(((int)threadIdx.y) * 64));
  __syncthreads();
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)0) & (uint)252645135), ((uint)1 << (uint)0), ((uint)(((int)threadIdx.y) * 64))))] * ((float)balanced_values_local_ptr[0])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)4) & (uint)252645135), ((uint)1 << (uint)0), ((uint)(((int)threadIdx.y) * 64))))] * ((float)balanced_values_local_ptr[1])));
  uint cse_v5 = ((uint)1 << (uint)8);
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)0) & (uint)252645135), ((uint)1 << (uint)8), ((uint)(((int)threadIdx.y) * 64))))] * ((float)balanced_values_local_ptr[2])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)4) & (uint)252645135), ((uint)1 << (uint)8), ((uint)(((int)threadIdx.y) * 64))))] * ((float)balanced_values_local_ptr[3])));
  uint cse_v6 = ((uint)1 << (uint)16);
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)0) & (uint)252645135), ((uint)1 << (uint)16), ((uint)(((int)threadIdx.y) * 64)))) + 16)] * ((float)balanced_values_local_ptr[4])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)4) & (uint)252645135), ((uint)1 << (uint)16), ((uint)(((int)threadIdx.y) * 64)))) + 16)] * ((float)balanced_values_local_ptr[5])));
  uint cse_v7 = ((uint)1 << (uint)24);
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)0) & (uint)252645135), ((uint)1 << (uint)24), ((uint)(((int)threadIdx.y) * 64)))) + 16)] * ((float)balanced_values_local_ptr[6])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)4) & (uint)252645135), ((uint)1 << (uint)24), ((uint)(((int)threadIdx.y) * 64)))) + 16)] * ((float)balanced_values_local_ptr[7])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)0) & (uint)252645135), ((uint)1 << (uint)0), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * ((float)balanced_values_local_ptr[8])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)4) & (uint)252645135), ((uint)1 << (uint)0), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * ((float)balanced_values_local_ptr[9])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)0) & (uint)252645135), ((uint)1 << (uint)8), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * ((float)balanced_values_local_ptr[10])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)4) & (uint)252645135), ((uint)1 << (uint)8), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * ((float)balanced_values_local_ptr[11])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)0) & (uint)252645135), ((uint)1 << (uint)16), ((uint)(((int)threadIdx.y) * 64)))) + 48)] * ((float)balanced_values_local_ptr[12])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)4) & (uint)252645135), ((uint)1 << (uint)16), ((uint)(((int)threadIdx.y) * 64)))) + 48)] * ((float)balanced_values_local_ptr[13])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)0) & (uint)252645135), ((uint)1 << (uint)24), ((uint)(((int)threadIdx.y) * 64)))) + 48)] * ((float)balanced_values_local_ptr[14])));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)4) & (uint)252645135), ((uint)1 << (uint)24), ((uint)(((int)threadIdx.y) * 64)))) + 48)] * ((float)balanced_values_local_ptr[15])));
  __syncthreads();
  balanced_data_shared_ptr[((((int)threadIdx.y) * 32) + ((int)threadIdx.x))] = balanced_partial_local_ptr[0];
  __syncthreads();
  for (int ax5 = 0; ax5 < 8; ++ax5) {
    if (((int)threadIdx.y) < 1) {
      if (ax5 == 0) {
        balanced_sparse_dense_local_ptr[0] = 0x0p+0f/*0.000000e+00*/;
      }
      balanced_sparse_dense_local_ptr[0] = (balanced_sparse_dense_local_ptr[0] + balanced_data_shared_ptr[((ax5 * 32) + ((int)threadIdx.x))]);
    }
  }
  if (((int)threadIdx.y) < 1) {
    int cse_v10 = ((((int)blockIdx.x) * 32) + ((int)threadIdx.x));
    T_add_intermediate_ptr[((((int)blockIdx.x) * 32) + ((int)threadIdx.x))] = (((half)balanced_sparse_dense_local_ptr[0]) + bias_ptr[((((int)blockIdx.x) * 32) + ((int)threadIdx.x))]);
  }
}
