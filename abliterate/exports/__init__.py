"""The edit in other forms: a patch, an adapter; and a quantised checkpoint as bfloat16."""
