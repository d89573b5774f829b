"""`kvshare route`: one address for several servers; each request goes where its donor is."""
