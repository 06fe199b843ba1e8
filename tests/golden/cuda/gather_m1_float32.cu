extern "C" __global__ void __launch_bounds__(512) main_kernel(float* __restrict__ compute_intermediate_ptr, uchar* __restrict__ indices_ptr, float* __restrict__ values_ptr, float* __restrict__ x_ptr) {
  alignas(64) float balanced_partial_local_ptr[1];
  alignas(64) float4 balanced_rows_local_ptr[1];
  __shared__ alignas(64) float balanced_data_shared_ptr[1024];
  alignas(64) float balanced_values_local_ptr[16];
  alignas(64) uint balanced_indices_local_ptr[2];
  alignas(64) uint balanced_positions_local_ptr[16];
  alignas(64) uint balanced_left_ptr[1];
  alignas(64) float balanced_sparse_dense_local_ptr[1];
  balanced_partial_local_ptr[0] = 0x0p+0f/*0.000000e+00*/;
  int cse_v1 = (((int)threadIdx.x) * 4);
  int cse_v3 = ((((int)threadIdx.y) * 128) + (((int)threadIdx.x) * 4));
  if (((int)threadIdx.y) < 8) {
    balanced_rows_local_ptr[0] = *(float4*)(x_ptr + ((((int)threadIdx.y) * 128) + (((int)threadIdx.x) * 4)));
  }
  if (((int)threadIdx.y) < 8) {
    *(float4*)(balanced_data_shared_ptr + ((((int)threadIdx.y) * 128) + (((int)threadIdx.x) * 4))) = balanced_rows_local_ptr[0];
  }
  for (int ax2 = 0; ax2 < 4; ++ax2) {
    *(float4*)(balanced_values_local_ptr + (ax2 * 4)) = *(float4*)(values_ptr + ((((((int)blockIdx.x) * 8192) + (((int)threadIdx.y) * 512)) + (ax2 * 128)) + (((int)threadIdx.x) * 4)));
  }
  for (int ax2_1 = 0; ax2_1 < 2; ++ax2_1) {
      uint v_ = *(uint*)(indices_ptr + ((((((int)blockIdx.x) * 4096) + (((int)threadIdx.y) * 256)) + (ax2_1 * 128)) + (((int)threadIdx.x) * 4)));
    balanced_indices_local_ptr[ax2_1] = (*(uint *)(&(v_)));
  }
  for (int ax2_2 = 0; ax2_2 < 2; ++ax2_2) {
    balanced_left_ptr[0] = __byte_perm(balanced_indices_local_ptr[ax2_2], (uint)0, (uint)291);
    int cse_v2 = (ax2_2 * 8);
    balanced_positions_local_ptr[(ax2_2 * 8)] = ((uint)(31 - __clz(balanced_left_ptr[0])));
    balanced_left_ptr[0] = (balanced_left_ptr[0] ^ ((uint)1 << balanced_positions_local_ptr[(ax2_2 * 8)]));
    int cse_v4 = ((ax2_2 * 8) + 1);
    balanced_positions_local_ptr[((ax2_2 * 8) + 1)] = ((uint)(31 - __clz(balanced_left_ptr[0])));
    balanced_left_ptr[0] = (balanced_left_ptr[0] ^ ((uint)1 << balanced_positions_local_ptr[((ax2_2 * 8) + 1)]));
    int cse_v5 = ((ax2_2 * 8) + 2);
    balanced_positions_local_ptr[((ax2_2 * 8) + 2)] = ((uint)(31 - __clz(balanced_left_ptr[0])));
    balanced_left_ptr[0] = (balanced_left_ptr[0] ^ ((uint)1 << balanced_positions_local_ptr[((ax2_2 * 8) + 2)]));
    int cse_v6 = ((ax2_2 * 8) + 3);
    balanced_positions_local_ptr[((ax2_2 * 8) + 3)] = ((uint)(31 - __clz(balanced_left_ptr[0])));
    balanced_left_ptr[0] = (balanced_left_ptr[0] ^ ((uint)1 << balanced_positions_local_ptr[((ax2_2 * 8) + 3)]));
    int cse_v7 = ((ax2_2 * 8) + 4);
    balanced_positions_local_ptr[((ax2_2 * 8) + 4)] = ((uint)(31 - __clz(balanced_left_ptr[0])));
    balanced_left_ptr[0] = (balanced_left_ptr[0] ^ ((uint)1 << balanced_positions_local_ptr[((ax2_2 * 8) + 4)]));
    int cse_v8 = ((ax2_2 * 8) + 5);
    balanced_positions_local_ptr[((ax2_2 * 8) + 5)] = ((uint)(31 - __clz(balanced_left_ptr[0])));
    balanced_left_ptr[0] = (balanced_left_ptr[0] ^ ((uint)1 << balanced_positions_local_ptr[((ax2_2 * 8) + 5)]));
    int cse_v9 = ((ax2_2 * 8) + 6);
    balanced_positions_local_ptr[((ax2_2 * 8) + 6)] = ((uint)(31 - __clz(balanced_left_ptr[0])));
    balanced_left_ptr[0] = (balanced_left_ptr[0] ^ ((uint)1 << balanced_positions_local_ptr[((ax2_2 * 8) + 6)]));
    int cse_v10 = ((ax2_2 * 8) + 7);
    balanced_positions_local_ptr[((ax2_2 * 8) + 7)] = ((uint)(31 - __clz(balanced_left_ptr[0])));
    balanced_left_ptr[0] = (balanced_left_ptr[0] ^ ((uint)1 << balanced_positions_local_ptr[((ax2_2 * 8) + 7)]));
  }
  int cse_v11 = ((((int)threadIdx.y) * 64) + 31);
  __syncthreads();
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((int)balanced_positions_local_ptr[0]), 255, ((((int)threadIdx.y) * 64) + 31)))] * balanced_values_local_ptr[0]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((int)balanced_positions_local_ptr[1]), 255, ((((int)threadIdx.y) * 64) + 31)))] * balanced_values_local_ptr[1]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((int)balanced_positions_local_ptr[2]), 255, ((((int)threadIdx.y) * 64) + 31)))] * balanced_values_local_ptr[2]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((int)balanced_positions_local_ptr[3]), 255, ((((int)threadIdx.y) * 64) + 31)))] * balanced_values_local_ptr[3]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((int)balanced_positions_local_ptr[4]), 255, ((((int)threadIdx.y) * 64) + 31)))] * balanced_values_local_ptr[4]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((int)balanced_positions_local_ptr[5]), 255, ((((int)threadIdx.y) * 64) + 31)))] * balanced_values_local_ptr[5]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((int)balanced_positions_local_ptr[6]), 255, ((((int)threadIdx.y) * 64) + 31)))] * balanced_values_local_ptr[6]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((int)__dp4a(((int)balanced_positions_local_ptr[7]), 255, ((((int)threadIdx.y) * 64) + 31)))] * balanced_values_local_ptr[7]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((int)balanced_positions_local_ptr[8]), 255, ((((int)threadIdx.y) * 64) + 31))) + 32)] * balanced_values_local_ptr[8]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((int)balanced_positions_local_ptr[9]), 255, ((((int)threadIdx.y) * 64) + 31))) + 32)] * balanced_values_local_ptr[9]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((int)balanced_positions_local_ptr[10]), 255, ((((int)threadIdx.y) * 64) + 31))) + 32)] * balanced_values_local_ptr[10]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((int)balanced_positions_local_ptr[11]), 255, ((((int)threadIdx.y) * 64) + 31))) + 32)] * balanced_values_local_ptr[11]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((int)balanced_positions_local_ptr[12]), 255, ((((int)threadIdx.y) * 64) + 31))) + 32)] * balanced_values_local_ptr[12]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((int)balanced_positions_local_ptr[13]), 255, ((((int)threadIdx.y) * 64) + 31))) + 32)] * balanced_values_local_ptr[13]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((int)balanced_positions_local_ptr[14]), 255, ((((int)threadIdx.y) * 64) + 31))) + 32)] * balanced_values_local_ptr[14]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((int)__dp4a(((int)balanced_positions_local_ptr[15]), 255, ((((int)threadIdx.y) * 64) + 31))) + 32)] * balanced_values_local_ptr[15]));
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
