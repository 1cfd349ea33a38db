"""The HTTP server. A dialect translates its protocol to one internal request and the stream of deltas back to it."""
