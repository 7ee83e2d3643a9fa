"""Random JSON schemas of the keywords that tools and structured output use."""

TRICKY = ["name", "city", "n", "weather station", "größe", 'a"b', "x"]


def schema(r, depth=0):
    """A random JSON schema out of what tools and structured output use."""
    kinds = ["string", "integer", "boolean", "enum", "null"]
    kinds += ["number", "const", "anyOf", "array", "object", "format"] if depth < 3 else []
    kind = r.choice(kinds + (["recursive"] if not depth else []))
    return DRAWN[kind](r, depth) if kind in DRAWN else {"type": kind}


def _string(r, depth):
    if r.random() < 0.2:
        return {"type": "string", "pattern": r.choice(["^[a-z]{2,5}$", "^[A-Z]+-[0-9]{3}$", "^(yes|no|maybe)$"])}
    bounds = {"minLength": r.randint(0, 4), "maxLength": r.randint(4, 12)}
    return {"type": "string"} | {key: value for key, value in bounds.items() if r.random() < 0.3}


def _integer(r, depth, kind="integer"):
    bounds = {"minimum": r.randint(-50, 50), "maximum": r.randint(51, 5000)}
    return {"type": kind} | {key: value for key, value in bounds.items() if r.random() < 0.4}


def _number(r, depth):
    return _integer(r, depth, "number")


def _enum(r, depth):
    return {"enum": r.sample(["red", "green", 1, None, True, "天", 'a "b"', 2.5], r.randint(1, 4))}


def _const(r, depth):
    return {"const": r.choice(["x", 3, {"a": [1]}, None])}


def _anyOf(r, depth):
    return {"anyOf": [schema(r, depth + 1) for _ in range(r.randint(1, 3))]}


def _format(r, depth):
    return {"type": "string", "format": r.choice(["date", "time", "date-time", "email", "uuid", "ipv4"])}


def _array(r, depth):
    bounds = {"minItems": r.randint(0, 3), "maxItems": r.randint(3, 5)}
    kept = {key: value for key, value in bounds.items() if r.random() < 0.4}
    return {"type": "array", "items": schema(r, depth + 1)} | kept


def object_schema(r, depth):
    properties = {key: schema(r, depth + 1) for key in r.sample(TRICKY, r.randint(0, 4))}
    required = [key for key in properties if r.random() < 0.6]
    return {"type": "object", "properties": properties, "required": required}


def _recursive(r, depth):
    below = {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}
    node = {"type": "object", "properties": {"v": {"type": "integer"}, "next": below}, "required": ["next"]}
    return {"$ref": "#/$defs/node", "$defs": {"node": node}}


DRAWN = {
    "string": _string,
    "integer": _integer,
    "number": _number,
    "enum": _enum,
    "const": _const,
    "anyOf": _anyOf,
    "format": _format,
    "array": _array,
    "object": object_schema,
    "recursive": _recursive,
}
