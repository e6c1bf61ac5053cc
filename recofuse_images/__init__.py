"""Files to arrays and back, without torch: the one reader of service, command, library and client.

Arrays are NumPy's, RGB: (H, W, 3) and (H, W). Nothing here knows a request, a model or a setting.
"""
