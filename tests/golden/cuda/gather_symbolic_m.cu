extern "C" __global__ void __launch_bounds__(160) main_kernel(half* __restrict__ balanced_out_ptr, uchar* __restrict__ indices_ptr, half* __restrict__ values_ptr, half* __restrict__ x_ptr, int64_t m) {
  alignas(64) float balanced_partial_local_ptr[8];
  alignas(64) half balanced_rows_local_ptr[8];
  __shared__ alignas(64) half balanced_data_shared_ptr[680];
  alignas(64) half balanced_values_local_ptr[4];
  alignas(64) uchar balanced_indices_local_ptr[2];
  __shared__ alignas(64) float balanced_partial_shared_ptr[1280];
  alignas(64) float balanced_sparse_dense_local_ptr[1];
  *(float4*)(balanced_partial_local_ptr + 0) = make_float4(0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/);
  *(float4*)(balanced_partial_local_ptr + 4) = make_float4(0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/);
  int64_t cse_v1 = (((int64_t)threadIdx.x) >> (int64_t)3);
  int64_t cse_v2 = (((int64_t)threadIdx.x) & (int64_t)7);
  int64_t cse_v3 = (((int64_t)blockIdx.y) * (int64_t)8);
  int64_t cse_v4 = (m - (int64_t)1);
  int64_t cse_v7 = ((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4));
  int64_t cse_v8 = ((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3));
  int64_t cse_v9 = ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)2);
  int64_t cse_v12 = (((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5);
  int64_t cse_v14 = ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)16);
  int64_t cse_v16 = (((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) % (int64_t)5) * (int64_t)8) + (((int64_t)threadIdx.x) & (int64_t)7));
  int64_t cse_v17 = ((((int64_t)blockIdx.y) * (int64_t)8) + ((((((int64_t)threadIdx.y) * (int64_t)4) + (((int64_t)threadIdx.x) >> (int64_t)3)) / (int64_t)5) * (int64_t)4));
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
  int64_t cse_v15 = (((((int64_t)threadIdx.y) * (int64_t)272) + ((((int64_t)threadIdx.x) >> (int64_t)3) * (int64_t)68)) + ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)8));
  if (((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4)) < (int64_t)5) {
    int4 v_ = make_int4((0)+(2*0), (0)+(2*1), (0)+(2*2), (0)+(2*3));
    *(half4*)(balanced_data_shared_ptr + (((((int64_t)threadIdx.y) * (int64_t)272) + ((((int64_t)threadIdx.x) >> (int64_t)3) * (int64_t)68)) + ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)8))) = make_half4(balanced_rows_local_ptr[v_.x],balanced_rows_local_ptr[v_.y],balanced_rows_local_ptr[v_.z],balanced_rows_local_ptr[v_.w]);
  }
  if (((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4)) < (int64_t)5) {
    int4 v__1 = make_int4((1)+(2*0), (1)+(2*1), (1)+(2*2), (1)+(2*3));
    *(half4*)(balanced_data_shared_ptr + ((((((int64_t)threadIdx.y) * (int64_t)272) + ((((int64_t)threadIdx.x) >> (int64_t)3) * (int64_t)68)) + ((((int64_t)threadIdx.x) & (int64_t)7) * (int64_t)8)) + (int64_t)4)) = make_half4(balanced_rows_local_ptr[v__1.x],balanced_rows_local_ptr[v__1.y],balanced_rows_local_ptr[v__1.z],balanced_rows_local_ptr[v__1.w]);
  }
  for (int ax2 = 0; ax2 < 2; ++ax2) {
    *(half2*)(balanced_values_local_ptr + (ax2 * 2)) = *(half2*)(values_ptr + ((((((int64_t)blockIdx.x) * (int64_t)640) + (((int64_t)ax2) * (int64_t)320)) + (((int64_t)threadIdx.y) * (int64_t)64)) + (((int64_t)threadIdx.x) * (int64_t)2)));
  }
  int64_t cse_v5 = (((int64_t)threadIdx.y) * (int64_t)32);
  for (int ax2_1 = 0; ax2_1 < 2; ++ax2_1) {
    balanced_indices_local_ptr[ax2_1] = indices_ptr[((((((int64_t)blockIdx.x) * (int64_t)320) + (((int64_t)ax2_1) * (int64_t)160)) + (((int64_t)threadIdx.y) * (int64_t)32)) + ((int64_t)threadIdx.x))];
  }
  int64_t cse_v10 = ((((int64_t)threadIdx.y) >> (int64_t)1) * (int64_t)68);
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
  int64_t cse_v13 = (((((int64_t)threadIdx.y) + (int64_t)5) >> (int64_t)1) * (int64_t)68);
  float4 __17;
    float4 __18;
      float4 __19;
      half4 v__14 = *(half4*)(balanced_data_shared_ptr + ((((((int64_t)threadIdx.y) + (int64_t)5) >> (int64_t)1) * (int64_t)68) + (((int64_t)(((int)(balanced_indices_local_ptr[1] >> (uchar)0)) & 15)) * (int64_t)4)));
      __19.x = (float)(v__14.x);
      __19.y = (float)(v__14.y);
      __19.z = (float)(v__14.z);
      __19.w = (float)(v__14.w);
      float4 __20;
      half4 v__15 = make_half4(balanced_values_local_ptr[2], balanced_values_local_ptr[2], balanced_values_local_ptr[2], balanced_values_local_ptr[2]);
      __20.x = (float)(v__15.x);
      __20.y = (float)(v__15.y);
      __20.z = (float)(v__15.z);
      __20.w = (float)(v__15.w);
      __18.x = (__19.x*__20.x);
      __18.y = (__19.y*__20.y);
      __18.z = (__19.z*__20.z);
      __18.w = (__19.w*__20.w);
    float4 v__16 = *(float4*)(balanced_partial_local_ptr + 0);
    __17.x = (__18.x+v__16.x);
    __17.y = (__18.y+v__16.y);
    __17.z = (__18.z+v__16.z);
    __17.w = (__18.w+v__16.w);
  *(float4*)(balanced_partial_local_ptr + 0) = __17;
  float4 __21;
    float4 __22;
      float4 __23;
      half4 v__17 = *(half4*)(balanced_data_shared_ptr + (((((((int64_t)threadIdx.y) + (int64_t)5) >> (int64_t)1) * (int64_t)68) + (((int64_t)(((int)(balanced_indices_local_ptr[1] >> (uchar)0)) & 15)) * (int64_t)4)) + (int64_t)340));
      __23.x = (float)(v__17.x);
      __23.y = (float)(v__17.y);
      __23.z = (float)(v__17.z);
      __23.w = (float)(v__17.w);
      float4 __24;
      half4 v__18 = make_half4(balanced_values_local_ptr[2], balanced_values_local_ptr[2], balanced_values_local_ptr[2], balanced_values_local_ptr[2]);
      __24.x = (float)(v__18.x);
      __24.y = (float)(v__18.y);
      __24.z = (float)(v__18.z);
      __24.w = (float)(v__18.w);
      __22.x = (__23.x*__24.x);
      __22.y = (__23.y*__24.y);
      __22.z = (__23.z*__24.z);
      __22.w = (__23.w*__24.w);
    float4 v__19 = *(float4*)(balanced_partial_local_ptr + 4);
    __21.x = (__22.x+v__19.x);
    __21.y = (__22.y+v__19.y);
    __21.z = (__22.z+v__19.z);
    __21.w = (__22.w+v__19.w);
  *(float4*)(balanced_partial_local_ptr + 4) = __21;
  float4 __25;
    float4 __26;
      float4 __27;
      half4 v__20 = *(half4*)(balanced_data_shared_ptr + ((((((int64_t)threadIdx.y) + (int64_t)5) >> (int64_t)1) * (int64_t)68) + (((int64_t)(((int)(balanced_indices_local_ptr[1] >> (uchar)4)) & 15)) * (int64_t)4)));
      __27.x = (float)(v__20.x);
      __27.y = (float)(v__20.y);
      __27.z = (float)(v__20.z);
      __27.w = (float)(v__20.w);
      float4 __28;
      half4 v__21 = make_half4(balanced_values_local_ptr[3], balanced_values_local_ptr[3], balanced_values_local_ptr[3], balanced_values_local_ptr[3]);
      __28.x = (float)(v__21.x);
      __28.y = (float)(v__21.y);
      __28.z = (float)(v__21.z);
      __28.w = (float)(v__21.w);
      __26.x = (__27.x*__28.x);
      __26.y = (__27.y*__28.y);
      __26.z = (__27.z*__28.z);
      __26.w = (__27.w*__28.w);
    float4 v__22 = *(float4*)(balanced_partial_local_ptr + 0);
    __25.x = (__26.x+v__22.x);
    __25.y = (__26.y+v__22.y);
    __25.z = (__26.z+v__22.z);
    __25.w = (__26.w+v__22.w);
  *(float4*)(balanced_partial_local_ptr + 0) = __25;
  float4 __29;
    float4 __30;
      float4 __31;
      half4 v__23 = *(half4*)(balanced_data_shared_ptr + (((((((int64_t)threadIdx.y) + (int64_t)5) >> (int64_t)1) * (int64_t)68) + (((int64_t)(((int)(balanced_indices_local_ptr[1] >> (uchar)4)) & 15)) * (int64_t)4)) + (int64_t)340));
      __31.x = (float)(v__23.x);
      __31.y = (float)(v__23.y);
      __31.z = (float)(v__23.z);
      __31.w = (float)(v__23.w);
      float4 __32;
      half4 v__24 = make_half4(balanced_values_local_ptr[3], balanced_values_local_ptr[3], balanced_values_local_ptr[3], balanced_values_local_ptr[3]);
      __32.x = (float)(v__24.x);
      __32.y = (float)(v__24.y);
      __32.z = (float)(v__24.z);
      __32.w = (float)(v__24.w);
      __30.x = (__31.x*__32.x);
      __30.y = (__31.y*__32.y);
      __30.z = (__31.z*__32.z);
      __30.w = (__31.w*__32.w);
    float4 v__25 = *(float4*)(balanced_partial_local_ptr + 4);
    __29.x = (__30.x+v__25.x);
    __29.y = (__30.y+v__25.y);
    __29.z = (__30.z+v__25.z);
    __29.w = (__30.w+v__25.w);
  *(float4*)(balanced_partial_local_ptr + 4) = __29;
  for (int ax2_2 = 0; ax2_2 < 2; ++ax2_2) {
    for (int ax3 = 0; ax3 < 4; ++ax3) {
      balanced_partial_shared_ptr[((((((int64_t)threadIdx.y) * (int64_t)256) + (((int64_t)ax2_2) * (int64_t)128)) + (((int64_t)ax3) * (int64_t)32)) + ((int64_t)threadIdx.x))] = balanced_partial_local_ptr[((ax2_2 * 4) + ax3)];
    }
  }
  __syncthreads();
  for (int64_t ax1_ax2_fused_0 = (int64_t)0; ax1_ax2_fused_0 < (int64_t)2; ++ax1_ax2_fused_0) {
    int64_t cse_v6 = (ax1_ax2_fused_0 * (int64_t)5);
    int64_t cse_v11 = ((ax1_ax2_fused_0 * (int64_t)5) + ((int64_t)threadIdx.y));
    for (int ax5 = 0; ax5 < 5; ++ax5) {
      if (((ax1_ax2_fused_0 * (int64_t)5) + ((int64_t)threadIdx.y)) < (int64_t)8) {
        if (ax5 == 0) {
          balanced_sparse_dense_local_ptr[0] = 0x0p+0f/*0.000000e+00*/;
        }
        balanced_sparse_dense_local_ptr[0] = (balanced_sparse_dense_local_ptr[0] + balanced_partial_shared_ptr[((((((int64_t)ax5) * (int64_t)256) + (ax1_ax2_fused_0 * (int64_t)160)) + (((int64_t)threadIdx.y) * (int64_t)32)) + ((int64_t)threadIdx.x))]);
      }
    }
    if (((ax1_ax2_fused_0 * (int64_t)5) + ((int64_t)threadIdx.y)) < (int64_t)8) {
      if (((((((int64_t)blockIdx.y) * (int64_t)8) + (ax1_ax2_fused_0 * (int64_t)5)) + ((int64_t)threadIdx.y)) < m) && (((((int64_t)blockIdx.x) * (int64_t)16) + (((int64_t)threadIdx.x) >> (int64_t)1)) < (int64_t)25)) {
        balanced_out_ptr[(((((((int64_t)blockIdx.y) * (int64_t)400) + (ax1_ax2_fused_0 * (int64_t)250)) + (((int64_t)threadIdx.y) * (int64_t)50)) + (((int64_t)blockIdx.x) * (int64_t)32)) + ((int64_t)threadIdx.x))] = ((half)balanced_sparse_dense_local_ptr[0]);
      }
    }
  }
}
