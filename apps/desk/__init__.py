"""A small shop's customer-service desk that shows what is shared: `kvshare desk`."""
