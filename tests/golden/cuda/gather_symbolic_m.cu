extern "C" __global__ void __launch_bounds__(320) main_kernel(half* __restrict__ balanced_out_ptr, uchar* __restrict__ indices_ptr, half* __restrict__ values_ptr, half* __restrict__ x_ptr, int64_t m) {
  alignas(64) float balanced_partial_local_ptr[8];
  alignas(64) half balanced_rows_local_ptr[8];
  __shared__ alignas(64) half balanced_data_shared_ptr[680];
  alignas(64) half balanced_values_local_ptr[2];
  alignas(64) uchar balanced_indices_local_ptr[1];
  __shared__ alignas(64) float balanced_partial_shared_ptr[2560];
  alignas(64) float balanced_sparse_dense_local_ptr[1];
  *(float4*)(balanced_partial_local_ptr + 0) = make_float4(0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/);
  *(float4*)(balanced_partial_local_ptr + 4) = make_float4(0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/);
  int64_t cse_v1 = (((int64_t)threadIdx.x) >> (int64_t)3);
  int64_t cse_v2 = (((int64_t)threadIdx.x) & (int64_t)7);
  int64_t cse_v3 = (((int64_t)blockIdx.y) * (int64_t)8);
  int64_t cse_v4 = (m - (int64_t)1);
  int64_t cse_v6 = ((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4));
  int64_t cse_v7 = ((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3));
  int64_t cse_v8 = ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)2);
  int64_t cse_v10 = (((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5);
  int64_t cse_v11 = ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)16);
  int64_t cse_v13 = (((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)8) + (((int64_t)threadIdx.x) & (int64_t)7));
  int64_t cse_v14 = ((((int64_t)blockIdx.y) * (int64_t)8) + ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) / (int64_t)5) * (int64_t)4));
  if (((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4)) < (int64_t)5) {
    half2 condval;
    if ((((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)8) + (((int64_t)threadIdx.x) & (int64_t)7)) < (int64_t)35) {
      condval = *(half2*)(x_ptr + (((min(((((int64_t)blockIdx.y) * (int64_t)8) + ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) / (int64_t)5) * (int64_t)4)), (m - (int64_t)1)) * (int64_t)70) + ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)16)) + ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)2)));
    } else {
      condval = make_half2(__float2half_rn(0x0p+0f/*0.000000e+00*/), __float2half_rn(0x0p+0f/*0.000000e+00*/));
    }
    *(half2*)(balanced_rows_local_ptr + (int64_t)0) = condval;
  }
  if (((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4)) < (int64_t)5) {
    half2 condval_1;
    if ((((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)8) + (((int64_t)threadIdx.x) & (int64_t)7)) < (int64_t)35) {
      condval_1 = *(half2*)(x_ptr + (((min((((((int64_t)blockIdx.y) * (int64_t)8) + ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) / (int64_t)5) * (int64_t)4)) + (int64_t)1), (m - (int64_t)1)) * (int64_t)70) + ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)16)) + ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)2)));
    } else {
      condval_1 = make_half2(__float2half_rn(0x0p+0f/*0.000000e+00*/), __float2half_rn(0x0p+0f/*0.000000e+00*/));
    }
    *(half2*)(balanced_rows_local_ptr + (int64_t)2) = condval_1;
  }
  if (((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4)) < (int64_t)5) {
    half2 condval_2;
    if ((((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)8) + (((int64_t)threadIdx.x) & (int64_t)7)) < (int64_t)35) {
      condval_2 = *(half2*)(x_ptr + (((min((((((int64_t)blockIdx.y) * (int64_t)8) + ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) / (int64_t)5) * (int64_t)4)) + (int64_t)2), (m - (int64_t)1)) * (int64_t)70) + ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)16)) + ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)2)));
    } else {
      condval_2 = make_half2(__float2half_rn(0x0p+0f/*0.000000e+00*/), __float2half_rn(0x0p+0f/*0.000000e+00*/));
    }
    *(half2*)(balanced_rows_local_ptr + (int64_t)4) = condval_2;
  }
  if (((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4)) < (int64_t)5) {
    half2 condval_3;
    if ((((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)8) + (((int64_t)threadIdx.x) & (int64_t)7)) < (int64_t)35) {
      condval_3 = *(half2*)(x_ptr + (((min((((((int64_t)blockIdx.y) * (int64_t)8) + ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) / (int64_t)5) * (int64_t)4)) + (int64_t)3), (m - (int64_t)1)) * (int64_t)70) + ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)16)) + ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)2)));
    } else {
      condval_3 = make_half2(__float2half_rn(0x0p+0f/*0.000000e+00*/), __float2half_rn(0x0p+0f/*0.000000e+00*/));
    }
    *(half2*)(balanced_rows_local_ptr + (int64_t)6) = condval_3;
  }
  int64_t cse_v12 = (((((int64_t)threadIdx.y) * (int64_t)272) + ((((int64_t)threadIdx.x) >> (int64_t)3) * (int64_t)68)) + ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)8));
  if (((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4)) < (int64_t)5) {
    int4 v_ = make_int4((0)+(2*0), (0)+(2*1), (0)+(2*2), (0)+(2*3));
    *(half4*)(balanced_data_shared_ptr + (((((int64_t)threadIdx.y) * (int64_t)272) + ((((int64_t)threadIdx.x) >> (int64_t)3) * (int64_t)68)) + ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)8))) = make_half4(balanced_rows_local_ptr[v_.x],balanced_rows_local_ptr[v_.y],balanced_rows_local_ptr[v_.z],balanced_rows_local_ptr[v_.w]);
  }
  if (((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4)) < (int64_t)5) {
    int4 v__1 = make_int4((1)+(2*0), (1)+(2*1), (1)+(2*2), (1)+(2*3));
    *(half4*)(balanced_data_shared_ptr + ((((((int64_t)threadIdx.y) * (int64_t)272) + ((((int64_t)threadIdx.x) >> (int64_t)3) * (int64_t)68)) + ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)8)) + (int64_t)4)) = make_half4(balanced_rows_local_ptr[v__1.x],balanced_rows_local_ptr[v__1.y],balanced_rows_local_ptr[v__1.z],balanced_rows_local_ptr[v__1.w]);
  }
  *(half2*)(balanced_values_local_ptr + 0) = *(half2*)(values_ptr + (((((int64_t)blockIdx.x) * (int64_t)640) + (((int64_t)threadIdx.y) * (int64_t)64)) + (((int64_t)threadIdx.x) * (int64_t)2)));
  int64_t cse_v5 = (((int64_t)threadIdx.y) * (int64_t)32);
  balanced_indices_local_ptr[0] = indices_ptr[(((((int64_t)blockIdx.x) * (int64_t)320) + (((int64_t)threadIdx.y) * (int64_t)32)) + ((int64_t)threadIdx.x))];
  int64_t cse_v9 = ((((int64_t)threadIdx.y) >> (int64_t)1) * (int64_t)68);
  __syncthreads();
  float4 __1;
    float4 __2;
      float4 __3;
      half4 v__2 = *(half4*)(balanced_data_shared_ptr + (((((int64_t)threadIdx.y) >> (int64_t)1) * (int64_t)68) + (((int64_t)(((int)(balanced_indices_local_ptr[0] >> (uchar)0)) & 15)) * (int64_t)4)));
      __3.x = (float)(v__2.x);
      __3.y = (float)(v__2.y);
      __3.z = (float)(v__2.z);
      __3.w = (float)(v__2.w);
      float4 __4;
      half4 v__3 = make_half4(balanced_values_local_ptr[0], balanced_values_local_ptr[0], balanced_values_local_ptr[0], balanced_values_local_ptr[0]);
      __4.x = (float)(v__3.x);
      __4.y = (float)(v__3.y);
      __4.z = (float)(v__3.z);
      __4.w = (float)(v__3.w);
      __2.x = (__3.x*__4.x);
      __2.y = (__3.y*__4.y);
      __2.z = (__3.z*__4.z);
      __2.w = (__3.w*__4.w);
    float4 v__4 = *(float4*)(balanced_partial_local_ptr + 0);
    __1.x = (__2.x+v__4.x);
    __1.y = (__2.y+v__4.y);
    __1.z = (__2.z+v__4.z);
    __1.w = (__2.w+v__4.w);
  *(float4*)(balanced_partial_local_ptr + 0) = __1;
  float4 __5;
    float4 __6;
      float4 __7;
      half4 v__5 = *(half4*)(balanced_data_shared_ptr + ((((((int64_t)threadIdx.y) >> (int64_t)1) * (int64_t)68) + (((int64_t)(((int)(balanced_indices_local_ptr[0] >> (uchar)0)) & 15)) * (int64_t)4)) + (int64_t)340));
      __7.x = (float)(v__5.x);
      __7.y = (float)(v__5.y);
      __7.z = (float)(v__5.z);
      __7.w = (float)(v__5.w);
      float4 __8;
      half4 v__6 = make_half4(balanced_values_local_ptr[0], balanced_values_local_ptr[0], balanced_values_local_ptr[0], balanced_values_local_ptr[0]);
      __8.x = (float)(v__6.x);
      __8.y = (float)(v__6.y);
      __8.z = (float)(v__6.z);
      __8.w = (float)(v__6.w);
      __6.x = (__7.x*__8.x);
      __6.y = (__7.y*__8.y);
      __6.z = (__7.z*__8.z);
      __6.w = (__7.w*__8.w);
    float4 v__7 = *(float4*)(balanced_partial_local_ptr + 4);
    __5.x = (__6.x+v__7.x);
    __5.y = (__6.y+v__7.y);
    __5.z = (__6.z+v__7.z);
    __5.w = (__6.w+v__7.w);
  *(float4*)(balanced_partial_local_ptr + 4) = __5;
  float4 __9;
    float4 __10;
      float4 __11;
      half4 v__8 = *(half4*)(balanced_data_shared_ptr + (((((int64_t)threadIdx.y) >> (int64_t)1) * (int64_t)68) + (((int64_t)(((int)(balanced_indices_local_ptr[0] >> (uchar)4)) & 15)) * (int64_t)4)));
      __11.x = (float)(v__8.x);
      __11.y = (float)(v__8.y);
      __11.z = (float)(v__8.z);
      __11.w = (float)(v__8.w);
      float4 __12;
      half4 v__9 = make_half4(balanced_values_local_ptr[1], balanced_values_local_ptr[1], balanced_values_local_ptr[1], balanced_values_local_ptr[1]);
      __12.x = (float)(v__9.x);
      __12.y = (float)(v__9.y);
      __12.z = (float)(v__9.z);
      __12.w = (float)(v__9.w);
      __10.x = (__11.x*__12.x);
      __10.y = (__11.y*__12.y);
      __10.z = (__11.z*__12.z);
      __10.w = (__11.w*__12.w);
    float4 v__10 = *(float4*)(balanced_partial_local_ptr + 0);
    __9.x = (__10.x+v__10.x);
    __9.y = (__10.y+v__10.y);
    __9.z = (__10.z+v__10.z);
    __9.w = (__10.w+v__10.w);
  *(float4*)(balanced_partial_local_ptr + 0) = __9;
  float4 __13;
    float4 __14;
      float4 __15;
      half4 v__11 = *(half4*)(balanced_data_shared_ptr + ((((((int64_t)threadIdx.y) >> (int64_t)1) * (int64_t)68) + (((int64_t)(((int)(balanced_indices_local_ptr[0] >> (uchar)4)) & 15)) * (int64_t)4)) + (int64_t)340));
      __15.x = (float)(v__11.x);
      __15.y = (float)(v__11.y);
      __15.z = (float)(v__11.z);
      __15.w = (float)(v__11.w);
      float4 __16;
      half4 v__12 = make_half4(balanced_values_local_ptr[1], balanced_values_local_ptr[1], balanced_values_local_ptr[1], balanced_values_local_ptr[1]);
      __16.x = (float)(v__12.x);
      __16.y = (float)(v__12.y);
      __16.z = (float)(v__12.z);
      __16.w = (float)(v__12.w);
      __14.x = (__15.x*__16.x);
      __14.y = (__15.y*__16.y);
      __14.z = (__15.z*__16.z);
      __14.w = (__15.w*__16.w);
    float4 v__13 = *(float4*)(balanced_partial_local_ptr + 4);
    __13.x = (__14.x+v__13.x);
    __13.y = (__14.y+v__13.y);
    __13.z = (__14.z+v__13.z);
    __13.w = (__14.w+v__13.w);
  *(float4*)(balanced_partial_local_ptr + 4) = __13;
  for (int ax2 = 0; ax2 < 2; ++ax2) {
    for (int ax3 = 0; ax3 < 4; ++ax3) {
      balanced_partial_shared_ptr[((((((int64_t)threadIdx.y) * (int64_t)256) + (((int64_t)ax2) * (int64_t)128)) + (((int64_t)ax3) * (int64_t)32)) + ((int64_t)threadIdx.x))] = balanced_partial_local_ptr[((ax2 * 4) + ax3)];
    }
  }
  __syncthreads();
  for (int ax5 = 0; ax5 < 10; ++ax5) {
    if (((int64_t)threadIdx.y) < (int64_t)8) {
      if (ax5 == 0) {
        balanced_sparse_dense_local_ptr[0] = 0x0p+0f/*0.000000e+00*/;
      }
      balanced_sparse_dense_local_ptr[0] = (balanced_sparse_dense_local_ptr[0] + balanced_partial_shared_ptr[(((((int64_t)ax5) * (int64_t)256) + (((int64_t)threadIdx.y) * (int64_t)32)) + ((int64_t)threadIdx.x))]);
    }
  }
  if (((int64_t)threadIdx.y) < (int64_t)8) {
    if ((((((int64_t)blockIdx.y) * (int64_t)8) + ((int64_t)threadIdx.y)) < m) && (((((int64_t)blockIdx.x) * (int64_t)16) + (((int64_t)threadIdx.x) >> (int64_t)1)) < (int64_t)25)) {
      balanced_out_ptr[((((((int64_t)blockIdx.y) * (int64_t)400) + (((int64_t)threadIdx.y) * (int64_t)50)) + (((int64_t)blockIdx.x) * (int64_t)32)) + ((int64_t)threadIdx.x))] = ((half)balanced_sparse_dense_local_ptr[0]);
    }
  }
}
