"""The cluster protocol of clustered md: channel, messages, slots, takeover."""
