// Elements of the page. What is said in them is text, whatever it looks like.

export const byId = (id) => document.getElementById(id);

/** An element with attributes (`onclick` and such: what is called then) and children: elements, or text. */
export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** A number of things: "1 chunk", "2 chunks". */
export function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** A share as people read it. */
export function percent(share) {
  return `${Math.round(100 * share)}%`;
}
