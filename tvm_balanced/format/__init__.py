"""The packed format of a balanced weight; knows nothing of TVM."""
