// Two tools that this page runs itself, for trying out tool calls.

const tool = (name, description, properties) => ({
  type: "function",
  function: { name, description, parameters: { type: "object", properties, required: Object.keys(properties) } },
});

export const DEMO = [
  tool("calculate", "Work out an arithmetic expression with + - * / ( ).", { expression: { type: "string" } }),
  tool("get_time", "The present date and time of the user.", {}),
];

const RUN = { calculate: ({ expression }) => String(calculate(expression)), get_time: () => new Date().toString() };

// The result of a call as text, or undefined if the tool is not one of these.
export function run({ name, arguments: text }) {
  if (!Object.hasOwn(RUN, name)) return undefined;
  try {
    return RUN[name](JSON.parse(text || "{}"));
  } catch (error) {
    return `error: ${error.message}`;
  }
}

export function calculate(text) {
  const tokens = String(text).match(/\d+\.?\d*|\.\d+|[-+*/()]|\S/g) ?? [];
  const sum = () => fold(product, "+-"), product = () => fold(factor, "*/");
  function fold(next, signs) {
    let value = next();
    while (tokens.length && signs.includes(tokens[0])) {
      const sign = tokens.shift(), other = next();
      value = { "+": value + other, "-": value - other, "*": value * other, "/": value / other }[sign];
    }
    return value;
  }
  function factor() {
    const token = tokens.shift();
    if (token === "-") return -factor();
    if (token === "(") {
      const value = sum();
      if (tokens.shift() !== ")") throw new Error("a bracket is not closed");
      return value;
    }
    if (!/^[\d.]/.test(token ?? "")) throw new Error(`expected a number, found ${token ?? "the end"}`);
    return Number(token);
  }
  const value = sum();
  if (tokens.length) throw new Error(`${tokens[0]} is not understood`);
  return value;
}
