extern "C" __global__ void __launch_bounds__(512) main_kernel(float* __restrict__ compute_intermediate_ptr, uchar* __restrict__ indices_ptr, float* __restrict__ values_ptr, float* __restrict__ x_ptr) {
  alignas(64) float balanced_partial_local_ptr[1];
  alignas(64) float4 balanced_rows_local_ptr[1];
  __shared__ alignas(64) float balanced_data_shared_ptr[1024];
  alignas(64) float balanced_values_local_ptr[16];
  alignas(64) uint balanced_indices_local_ptr[4];
  alignas(64) float balanced_sparse_dense_local_ptr[1];
  balanced_partial_local_ptr[0] = 0x0p+0f/*0.000000e+00*/;
  int cse_v1 = (((int)threadIdx.x) * 4);
  int cse_v6 = ((((int)threadIdx.y) * 128) + (((int)threadIdx.x) * 4));
  if (((int)threadIdx.y) < 8) {
    balanced_rows_local_ptr[0] = *(float4*)(x_ptr + ((((int)threadIdx.y) * 128) + (((int)threadIdx.x) * 4)));
  }
  if (((int)threadIdx.y) < 8) {
    *(float4*)(balanced_data_shared_ptr + ((((int)threadIdx.y) * 128) + (((int)threadIdx.x) * 4))) = balanced_rows_local_ptr[0];
  }
  int cse_v7 = ((((int)blockIdx.x) * 8192) + (((int)threadIdx.y) * 512));
  for (int ax2 = 0; ax2 < 4; ++ax2) {
    *(float4*)(balanced_values_local_ptr + (ax2 * 4)) = *(float4*)(values_ptr + ((((((int)blockIdx.x) * 8192) + (((int)threadIdx.y) * 512)) + (ax2 * 128)) + (((int)threadIdx.x) * 4)));
  }
  for (int ax2_1 = 0; ax2_1 < 4; ++ax2_1) {
      uint v_ = *(uint*)(indices_ptr + ((((((int)blockIdx.x) * 8192) + (((int)threadIdx.y) * 512)) + (ax2_1 * 128)) + (((int)threadIdx.x) * 4)));
    balanced_indices_local_ptr[ax2_1] = (*(uint *)(&(v_)));
  }
  uint cse_v2 = ((uint)1 << (uint)0);
  uint cse_v8 = ((uint)(((int)threadIdx.y) * 64));
  __syncthreads();
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)0), ((uint)(((int)threadIdx.y) * 64))))] * balanced_values_local_ptr[0]));
  uint cse_v3 = ((uint)1 << (uint)8);
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)8), ((uint)(((int)threadIdx.y) * 64))))] * balanced_values_local_ptr[1]));
  uint cse_v4 = ((uint)1 << (uint)16);
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)16), ((uint)(((int)threadIdx.y) * 64))))] * balanced_values_local_ptr[2]));
  uint cse_v5 = ((uint)1 << (uint)24);
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[0] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)24), ((uint)(((int)threadIdx.y) * 64))))] * balanced_values_local_ptr[3]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)0), ((uint)(((int)threadIdx.y) * 64))))] * balanced_values_local_ptr[4]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)8), ((uint)(((int)threadIdx.y) * 64))))] * balanced_values_local_ptr[5]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)16), ((uint)(((int)threadIdx.y) * 64))))] * balanced_values_local_ptr[6]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((balanced_indices_local_ptr[1] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)24), ((uint)(((int)threadIdx.y) * 64))))] * balanced_values_local_ptr[7]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[2] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)0), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * balanced_values_local_ptr[8]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[2] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)8), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * balanced_values_local_ptr[9]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[2] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)16), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * balanced_values_local_ptr[10]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[2] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)24), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * balanced_values_local_ptr[11]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[3] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)0), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * balanced_values_local_ptr[12]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[3] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)8), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * balanced_values_local_ptr[13]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[3] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)16), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * balanced_values_local_ptr[14]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((balanced_indices_local_ptr[3] >> (uint)0) & (uint)4294967295), ((uint)1 << (uint)24), ((uint)(((int)threadIdx.y) * 64)))) + 32)] * balanced_values_local_ptr[15]));
  __syncthreads();
  balanced_data_shared_ptr[((((int)threadIdx.y) * 32) + ((int)threadIdx.x))] = balanced_partial_local_ptr[0];
  __syncthreads();
  for (int ax5 = 0; ax5 < 16; ++ax5) {
    if (((int)threadIdx.y) < 1) {
      if (ax5 == 0) {
        balanced_sparse_dense_local_ptr[0] = 0x0p+0f/*0.000000e+00*/;
      }
      balanced_sparse_dense_local_ptr[0] = (balanced_sparse_dense_local_ptr[0] + balanced_data_shared_ptr[((ax5 * 32) + ((int)threadIdx.x))]);
    }
  }
  if (((int)threadIdx.y) < 1) {
    compute_intermediate_ptr[((((int)blockIdx.x) * 32) + ((int)threadIdx.x))] = max(balanced_sparse_dense_local_ptr[0], 0x0p+0f/*0.000000e+00*/);
  }
}
