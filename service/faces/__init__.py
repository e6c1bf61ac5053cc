"""What callers speak to: HTTP, gRPC, Open Inference, and the gateway behind them."""
