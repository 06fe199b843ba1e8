extern "C" __global__ void __launch_bounds__(512) main_kernel(float* __restrict__ compute_intermediate_ptr, uchar* __restrict__ indices_ptr, float* __restrict__ values_ptr, float* __restrict__ x_ptr) {
  alignas(64) float balanced_partial_local_ptr[1];
  alignas(64) float4 balanced_rows_local_ptr[1];
  __shared__ alignas(64) float balanced_data_shared_ptr[1024];
  alignas(64) float balanced_values_local_ptr[16];
  alignas(64) uchar balanced_indices_local_ptr[16];
  alignas(64) float balanced_sparse_dense_local_ptr[1];
  balanced_partial_local_ptr[0] = 0x0p+0f/*0.000000e+00*/;
  int cse_v1 = (((int)threadIdx.y) * 128);
  int cse_v2 = (((int)threadIdx.x) * 4);
  int cse_v4 = ((((int)threadIdx.y) * 128) + (((int)threadIdx.x) * 4));
  if (((int)threadIdx.y) < 8) {
    balanced_rows_local_ptr[0] = *(float4*)(x_ptr + ((((int)threadIdx.y) * 128) + (((int)threadIdx.x) * 4)));
  }
  if (((int)threadIdx.y) < 8) {
    *(float4*)(balanced_data_shared_ptr + ((((int)threadIdx.y) * 128) + (((int)threadIdx.x) * 4))) = balanced_rows_local_ptr[0];
  }
  int cse_v3 = (((int)blockIdx.x) * 8192);
  for (int ax2 = 0; ax2 < 4; ++ax2) {
    *(float4*)(balanced_values_local_ptr + (ax2 * 4)) = *(float4*)(values_ptr + ((((((int)blockIdx.x) * 8192) + (ax2 * 2048)) + (((int)threadIdx.y) * 128)) + (((int)threadIdx.x) * 4)));
  }
  for (int ax2_1 = 0; ax2_1 < 4; ++ax2_1) {
    *(uint*)(balanced_indices_local_ptr + (ax2_1 * 4)) = *(uint*)(indices_ptr + ((((((int)blockIdx.x) * 8192) + (ax2_1 * 2048)) + (((int)threadIdx.y) * 128)) + (((int)threadIdx.x) * 4)));
  }
  int cse_v5 = ((((int)threadIdx.y) >> 1) * 32);
  __syncthreads();
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[0] >> (uchar)0)) & 255))] * balanced_values_local_ptr[0]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[1] >> (uchar)0)) & 255))] * balanced_values_local_ptr[1]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[2] >> (uchar)0)) & 255))] * balanced_values_local_ptr[2]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[(((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[3] >> (uchar)0)) & 255))] * balanced_values_local_ptr[3]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[4] >> (uchar)0)) & 255)) + 256)] * balanced_values_local_ptr[4]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[5] >> (uchar)0)) & 255)) + 256)] * balanced_values_local_ptr[5]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[6] >> (uchar)0)) & 255)) + 256)] * balanced_values_local_ptr[6]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[7] >> (uchar)0)) & 255)) + 256)] * balanced_values_local_ptr[7]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[8] >> (uchar)0)) & 255)) + 512)] * balanced_values_local_ptr[8]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[9] >> (uchar)0)) & 255)) + 512)] * balanced_values_local_ptr[9]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[10] >> (uchar)0)) & 255)) + 512)] * balanced_values_local_ptr[10]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[11] >> (uchar)0)) & 255)) + 512)] * balanced_values_local_ptr[11]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[12] >> (uchar)0)) & 255)) + 768)] * balanced_values_local_ptr[12]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[13] >> (uchar)0)) & 255)) + 768)] * balanced_values_local_ptr[13]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[14] >> (uchar)0)) & 255)) + 768)] * balanced_values_local_ptr[14]));
  balanced_partial_local_ptr[0] = (balanced_partial_local_ptr[0] + (balanced_data_shared_ptr[((((((int)threadIdx.y) >> 1) * 32) + (((int)(balanced_indices_local_ptr[15] >> (uchar)0)) & 255)) + 768)] * balanced_values_local_ptr[15]));
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
