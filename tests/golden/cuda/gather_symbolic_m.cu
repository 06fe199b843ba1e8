extern "C" __global__ void __launch_bounds__(320) main_kernel(half* __restrict__ balanced_out_ptr, uchar* __restrict__ indices_ptr, half* __restrict__ values_ptr, half* __restrict__ x_ptr, int64_t m) {
  alignas(64) float balanced_partial_local_ptr[8];
  __shared__ alignas(64) half balanced_data_shared_ptr[640];
  alignas(64) half balanced_values_local_ptr[2];
  alignas(64) uchar balanced_indices_local_ptr[1];
  __shared__ alignas(64) float balanced_partial_shared_ptr[2560];
  alignas(64) float balanced_sparse_dense_local_ptr[1];
  *(float4*)(balanced_partial_local_ptr + 0) = make_float4(0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/);
  *(float4*)(balanced_partial_local_ptr + 4) = make_float4(0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/, 0x0p+0f/*0.000000e+00*/);
  int64_t cse_v1 = (((int64_t)threadIdx.x) >> (int64_t)1);
  int64_t cse_v2 = (((int64_t)blockIdx.y) * (int64_t)8);
  int64_t cse_v3 = (m - (int64_t)1);
  int64_t cse_v4 = (((int64_t)threadIdx.y) * (int64_t)32);
  int64_t cse_v5 = ((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4));
  int64_t cse_v6 = ((((int64_t)threadIdx.y) * (int64_t)16) + (((int64_t)threadIdx.x) >> (int64_t)1));
  int64_t cse_v7 = ((((int64_t)threadIdx.y) * (int64_t)128) + (((int64_t)threadIdx.x) * (int64_t)4));
  if (((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4)) < (int64_t)5) {
    half4 condval;
    if (((((int64_t)threadIdx.y) * (int64_t)16) + (((int64_t)threadIdx.x) >> (int64_t)1)) < (int64_t)35) {
      longlong4 __1;
        longlong4 __2;
          longlong4 __3;
            longlong4 __4;
              longlong4 v_ = make_longlong4(((((int64_t)blockIdx.y) * (int64_t)8))+((int64_t)1*0), ((((int64_t)blockIdx.y) * (int64_t)8))+((int64_t)1*1), ((((int64_t)blockIdx.y) * (int64_t)8))+((int64_t)1*2), ((((int64_t)blockIdx.y) * (int64_t)8))+((int64_t)1*3));
              longlong4 v__1 = make_longlong4((m - (int64_t)1), (m - (int64_t)1), (m - (int64_t)1), (m - (int64_t)1));
              __4.x = min(v_.x, v__1.x);
              __4.y = min(v_.y, v__1.y);
              __4.z = min(v_.z, v__1.z);
              __4.w = min(v_.w, v__1.w);
            longlong4 v__2 = make_longlong4((int64_t)70, (int64_t)70, (int64_t)70, (int64_t)70);
            __3.x = (__4.x*v__2.x);
            __3.y = (__4.y*v__2.y);
            __3.z = (__4.z*v__2.z);
            __3.w = (__4.w*v__2.w);
          longlong4 v__3 = make_longlong4((((int64_t)threadIdx.y) * (int64_t)32), (((int64_t)threadIdx.y) * (int64_t)32), (((int64_t)threadIdx.y) * (int64_t)32), (((int64_t)threadIdx.y) * (int64_t)32));
          __2.x = (__3.x+v__3.x);
          __2.y = (__3.y+v__3.y);
          __2.z = (__3.z+v__3.z);
          __2.w = (__3.w+v__3.w);
        longlong4 v__4 = make_longlong4(((int64_t)threadIdx.x), ((int64_t)threadIdx.x), ((int64_t)threadIdx.x), ((int64_t)threadIdx.x));
        __1.x = (__2.x+v__4.x);
        __1.y = (__2.y+v__4.y);
        __1.z = (__2.z+v__4.z);
        __1.w = (__2.w+v__4.w);
      condval = make_half4(x_ptr[__1.x],x_ptr[__1.y],x_ptr[__1.z],x_ptr[__1.w]);
    } else {
      condval = make_half4(__float2half_rn(0x0p+0f/*0.000000e+00*/), __float2half_rn(0x0p+0f/*0.000000e+00*/), __float2half_rn(0x0p+0f/*0.000000e+00*/), __float2half_rn(0x0p+0f/*0.000000e+00*/));
    }
    *(half4*)(balanced_data_shared_ptr + ((((int64_t)threadIdx.y) * (int64_t)128) + (((int64_t)threadIdx.x) * (int64_t)4))) = condval;
  }
  if (((((int64_t)threadIdx.y) * (int64_t)2) + (((int64_t)threadIdx.x) >> (int64_t)4)) < (int64_t)5) {
    half4 condval_1;
    if (((((int64_t)threadIdx.y) * (int64_t)16) + (((int64_t)threadIdx.x) >> (int64_t)1)) < (int64_t)35) {
      longlong4 __5;
        longlong4 __6;
          longlong4 __7;
            longlong4 __8;
              longlong4 v__5 = make_longlong4((((((int64_t)blockIdx.y) * (int64_t)8) + (int64_t)4))+((int64_t)1*0), (((((int64_t)blockIdx.y) * (int64_t)8) + (int64_t)4))+((int64_t)1*1), (((((int64_t)blockIdx.y) * (int64_t)8) + (int64_t)4))+((int64_t)1*2), (((((int64_t)blockIdx.y) * (int64_t)8) + (int64_t)4))+((int64_t)1*3));
              longlong4 v__6 = make_longlong4((m - (int64_t)1), (m - (int64_t)1), (m - (int64_t)1), (m - (int64_t)1));
              __8.x = min(v__5.x, v__6.x);
              __8.y = min(v__5.y, v__6.y);
              __8.z = min(v__5.z, v__6.z);
              __8.w = min(v__5.w, v__6.w);
            longlong4 v__7 = make_longlong4((int64_t)70, (int64_t)70, (int64_t)70, (int64_t)70);
            __7.x = (__8.x*v__7.x);
            __7.y = (__8.y*v__7.y);
            __7.z = (__8.z*v__7.z);
            __7.w = (__8.w*v__7.w);
          longlong4 v__8 = make_longlong4((((int64_t)threadIdx.y) * (int64_t)32), (((int64_t)threadIdx.y) * (int64_t)32), (((int64_t)threadIdx.y) * (int64_t)32), (((int64_t)threadIdx.y) * (int64_t)32));
          __6.x = (__7.x+v__8.x);
          __6.y = (__7.y+v__8.y);
          __6.z = (__7.z+v__8.z);
          __6.w = (__7.w+v__8.w);
        longlong4 v__9 = make_longlong4(((int64_t)threadIdx.x), ((int64_t)threadIdx.x), ((int64_t)threadIdx.x), ((int64_t)threadIdx.x));
        __5.x = (__6.x+v__9.x);
        __5.y = (__6.y+v__9.y);
        __5.z = (__6.z+v__9.z);
        __5.w = (__6.w+v__9.w);
      condval_1 = make_half4(x_ptr[__5.x],x_ptr[__5.y],x_ptr[__5.z],x_ptr[__5.w]);
    } else {
      condval_1 = make_half4(__float2half_rn(0x0p+0f/*0.000000e+00*/), __float2half_rn(0x0p+0f/*0.000000e+00*/), __float2half_rn(0x0p+0f/*0.000000e+00*/), __float2half_rn(0x0p+0f/*0.000000e+00*/));
    }
    *(half4*)(balanced_data_shared_ptr + (((((int64_t)threadIdx.y) * (int64_t)128) + (((int64_t)threadIdx.x) * (int64_t)4)) + (int64_t)320)) = condval_1;
  }
  *(half2*)(balanced_values_local_ptr + 0) = *(half2*)(values_ptr + (((((int64_t)blockIdx.x) * (int64_t)640) + (((int64_t)threadIdx.y) * (int64_t)64)) + (((int64_t)threadIdx.x) * (int64_t)2)));
  balanced_indices_local_ptr[0] = indices_ptr[(((((int64_t)blockIdx.x) * (int64_t)320) + (((int64_t)threadIdx.y) * (int64_t)32)) + ((int64_t)threadIdx.x))];
  int64_t cse_v8 = ((((int64_t)threadIdx.y) >> (int64_t)1) * (int64_t)64);
  __syncthreads();
  float4 __9;
    float4 __10;
      float4 __11;
      half4 v__10 = *(half4*)(balanced_data_shared_ptr + (((((int64_t)threadIdx.y) >> (int64_t)1) * (int64_t)64) + (((int64_t)((int)((balanced_indices_local_ptr[0] >> (uchar)0) & (uchar)15))) * (int64_t)4)));
      __11.x = (float)(v__10.x);
      __11.y = (float)(v__10.y);
      __11.z = (float)(v__10.z);
      __11.w = (float)(v__10.w);
      float4 __12;
      half4 v__11 = make_half4(balanced_values_local_ptr[0], balanced_values_local_ptr[0], balanced_values_local_ptr[0], balanced_values_local_ptr[0]);
      __12.x = (float)(v__11.x);
      __12.y = (float)(v__11.y);
      __12.z = (float)(v__11.z);
      __12.w = (float)(v__11.w);
      __10.x = (__11.x*__12.x);
      __10.y = (__11.y*__12.y);
      __10.z = (__11.z*__12.z);
      __10.w = (__11.w*__12.w);
    float4 v__12 = *(float4*)(balanced_partial_local_ptr + 0);
    __9.x = (__10.x+v__12.x);
    __9.y = (__10.y+v__12.y);
    __9.z = (__10.z+v__12.z);
    __9.w = (__10.w+v__12.w);
  *(float4*)(balanced_partial_local_ptr + 0) = __9;
  float4 __13;
    float4 __14;
      float4 __15;
      half4 v__13 = *(half4*)(balanced_data_shared_ptr + ((((((int64_t)threadIdx.y) >> (int64_t)1) * (int64_t)64) + (((int64_t)((int)((balanced_indices_local_ptr[0] >> (uchar)0) & (uchar)15))) * (int64_t)4)) + (int64_t)320));
      __15.x = (float)(v__13.x);
      __15.y = (float)(v__13.y);
      __15.z = (float)(v__13.z);
      __15.w = (float)(v__13.w);
      float4 __16;
      half4 v__14 = make_half4(balanced_values_local_ptr[0], balanced_values_local_ptr[0], balanced_values_local_ptr[0], balanced_values_local_ptr[0]);
      __16.x = (float)(v__14.x);
      __16.y = (float)(v__14.y);
      __16.z = (float)(v__14.z);
      __16.w = (float)(v__14.w);
      __14.x = (__15.x*__16.x);
      __14.y = (__15.y*__16.y);
      __14.z = (__15.z*__16.z);
      __14.w = (__15.w*__16.w);
    float4 v__15 = *(float4*)(balanced_partial_local_ptr + 4);
    __13.x = (__14.x+v__15.x);
    __13.y = (__14.y+v__15.y);
    __13.z = (__14.z+v__15.z);
    __13.w = (__14.w+v__15.w);
  *(float4*)(balanced_partial_local_ptr + 4) = __13;
  float4 __17;
    float4 __18;
      float4 __19;
      half4 v__16 = *(half4*)(balanced_data_shared_ptr + (((((int64_t)threadIdx.y) >> (int64_t)1) * (int64_t)64) + (((int64_t)((int)((balanced_indices_local_ptr[0] >> (uchar)4) & (uchar)15))) * (int64_t)4)));
      __19.x = (float)(v__16.x);
      __19.y = (float)(v__16.y);
      __19.z = (float)(v__16.z);
      __19.w = (float)(v__16.w);
      float4 __20;
      half4 v__17 = make_half4(balanced_values_local_ptr[1], balanced_values_local_ptr[1], balanced_values_local_ptr[1], balanced_values_local_ptr[1]);
      __20.x = (float)(v__17.x);
      __20.y = (float)(v__17.y);
      __20.z = (float)(v__17.z);
      __20.w = (float)(v__17.w);
      __18.x = (__19.x*__20.x);
      __18.y = (__19.y*__20.y);
      __18.z = (__19.z*__20.z);
      __18.w = (__19.w*__20.w);
    float4 v__18 = *(float4*)(balanced_partial_local_ptr + 0);
    __17.x = (__18.x+v__18.x);
    __17.y = (__18.y+v__18.y);
    __17.z = (__18.z+v__18.z);
    __17.w = (__18.w+v__18.w);
  *(float4*)(balanced_partial_local_ptr + 0) = __17;
  float4 __21;
    float4 __22;
      float4 __23;
      half4 v__19 = *(half4*)(balanced_data_shared_ptr + ((((((int64_t)threadIdx.y) >> (int64_t)1) * (int64_t)64) + (((int64_t)((int)((balanced_indices_local_ptr[0] >> (uchar)4) & (uchar)15))) * (int64_t)4)) + (int64_t)320));
      __23.x = (float)(v__19.x);
      __23.y = (float)(v__19.y);
      __23.z = (float)(v__19.z);
      __23.w = (float)(v__19.w);
      float4 __24;
      half4 v__20 = make_half4(balanced_values_local_ptr[1], balanced_values_local_ptr[1], balanced_values_local_ptr[1], balanced_values_local_ptr[1]);
      __24.x = (float)(v__20.x);
      __24.y = (float)(v__20.y);
      __24.z = (float)(v__20.z);
      __24.w = (float)(v__20.w);
      __22.x = (__23.x*__24.x);
      __22.y = (__23.y*__24.y);
      __22.z = (__23.z*__24.z);
      __22.w = (__23.w*__24.w);
    float4 v__21 = *(float4*)(balanced_partial_local_ptr + 4);
    __21.x = (__22.x+v__21.x);
    __21.y = (__22.y+v__21.y);
    __21.z = (__22.z+v__21.z);
    __21.w = (__22.w+v__21.w);
  *(float4*)(balanced_partial_local_ptr + 4) = __21;
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
