// Nodes, never markup: what stands in an answer can only become text.

/** An element with properties and children; texts become text nodes. */
export function node(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-")) made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** Seconds for people. */
export function seconds(value) {
  if (value < 0.095) return "under 0.1 s";
  if (value < 9.95) return `${value.toFixed(1)} s`;
  return value < 100 ? `${Math.round(value)} s` : `${Math.round(value / 60)} min`;
}

/** Seconds that are expected. */
export const about = (value) => (value < 0.095 ? seconds(value) : `about ${seconds(value)}`);

export const count = (number, one, many = `${one}s`) => `${number} ${number === 1 ? one : many}`;
